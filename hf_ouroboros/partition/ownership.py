"""Which parameters a process holds: those it owns; all others lie on the meta device, without memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .packed import forget_foreign
from .packed_tensors import emptied, is_own_kind

Owned = Callable[[str], bool]


def named_parts(model: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a module, or the parameter of this name, with their full names."""
    module, _, leaf = name.rpartition(".")
    parent = model.get_submodule(module)
    if leaf in parent._parameters:
        own = parent._parameters[leaf]
        return [] if own is None else [(name, own)]
    return list(model.get_submodule(name).named_parameters(prefix=name))


def names_of_parameters(model: nn.Module) -> list[tuple[nn.Parameter, tuple[str, ...]]]:
    """Every parameter once, in the model's order, with all of its names; a tied matrix has several."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return [(parameter, tuple(names)) for parameter, names in found.values()]


def parameter_places(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every place that holds a parameter, under one name: a tied matrix has several, a module with several names one.

    What is put into a place by two names would not be taken out again by both.
    """
    return [
        (f"{prefix}.{name}" if prefix else name, parameter)
        for prefix, part in module.named_modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]


def release_foreign(model: nn.Module, owned: Owned) -> tuple[str, ...]:
    """Turns the parameters that are not owned into meta parameters and drops their values and gradients.

    The Parameter objects stay the same, so an optimizer made before still names the right ones. What the optimizer
    holds for them (moments) is the caller's to drop. Memory that a parameter shares with others, such as a flat
    buffer, becomes free with the last of them. Buffers are left alone.

    Args:
        model: a model with real parameters; those on the meta device already are skipped.
        owned: whether this process owns the parameter of that name; one of its names is enough.

    Returns:
        The names of parameters that had to become new objects, because a weak reference, a view or a graph holds on
        to the old one; its memory is free only when they let go. Usually there are none.
    """
    replaced: list[str] = []
    for parameter, names in names_of_parameters(model):
        if parameter.is_meta or any(owned(name) for name in names):
            continue
        parameter.grad = None
        if is_own_kind(parameter):
            empty = emptied(parameter)
        else:
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
            empty.__dict__.update(parameter.__dict__)  # what others noted on it, e.g. transformers' _is_hf_initialized
        try:
            torch.utils.swap_tensors(parameter, empty)
        except RuntimeError:
            replaced.extend(names)
            for name in names:
                module, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(module), leaf, empty)
    forget_foreign(model)
    return tuple(replaced)


def check_owned(model: nn.Module, owned: Owned) -> None:
    """Makes sure that what is owned, and nothing else, has values.

    Raises:
        UnsupportedModelError: an owned parameter or a buffer is on the meta device, or a foreign parameter is not.
    """
    for parameter, names in names_of_parameters(model):
        mine = any(owned(name) for name in names)
        if parameter.is_meta == mine:
            raise UnsupportedModelError(
                f"{type(model).__name__}: the parameter {names[0]} {'has no values' if mine else 'has values'}, but "
                f"this process {'owns it' if mine else 'does not own it'}; this architecture can't be built in parts, "
                "please report it, and run it in one process"
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise UnsupportedModelError(
                f"{type(model).__name__}: the buffer {name} has no values; this architecture can't be built in parts, "
                "please report it, and run it in one process"
            )


def check_each_owned_once(model: nn.Module, owned: Sequence[Mapping[str, nn.Parameter]]) -> None:
    """Makes sure that every trainable parameter belongs to one stage, and to one only.

    Args:
        model: the model.
        owned: the parameters of each stage, by name.

    Raises:
        UnsupportedModelError: a parameter belongs to no stage, or to several.
    """
    owners: dict[int, list[int]] = {}
    for stage, parameters in enumerate(owned):
        for identity in {id(parameter) for parameter in parameters.values()}:
            owners.setdefault(identity, []).append(stage)
    for name, parameter in model.named_parameters():
        stages = owners.get(id(parameter), [])
        if parameter.requires_grad and len(stages) != 1:
            where = f"stages {', '.join(map(str, stages))} share" if stages else "no stage has"
            raise UnsupportedModelError(
                f"{where} the parameter {name} of this {type(model).__name__}, which would be stepped once per stage, each "
                "with another delay; give every layer its own (only the embedding matrix may be the head's, too), or freeze "
                "it, or train with num_stages=1"
            )
