"""Shadows: copies of a module tree that share parameters with the original, and in which modules can be replaced.

A shadow has module objects of its own, so neither train/eval switches nor swapped weights nor replaced modules reach the
original, but the same Parameter objects under the same names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from types import CellType, MethodType
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .packed import packed_linears, unpacked

Path = tuple[Any, ...]
"""Where a tensor is in nested containers: keys and positions from the outside in."""

Replacement = Callable[[nn.Module], nn.Module]
Root = TypeVar("Root", bound=nn.Module)


def shadow(module: Root, replacements: Mapping[int, Replacement] | None = None, own_hooks: bool = False) -> Root:
    """A copy of a module tree that shares parameters and buffers.

    Args:
        module: the root.
        replacements: {id of a module: makes what stands in its place}.
        own_hooks: whether hooks that are put on either from now on are not the other's.

    Raises:
        UnsupportedModelError: a module's forward was replaced by one that computes with the original's weights.
    """
    known: dict[int, nn.Module] = {}
    twin = _shadow(module, replacements or {}, known)
    for copied in list(known.values()):
        if own_hooks:
            for name in hook_dicts(copied):
                copied.__dict__[name] = copy.copy(copied.__dict__[name])
        for name, value in vars(copied).items():  # plain attributes that point back into the tree
            if isinstance(value, nn.Module) and id(value) in known:
                copied.__dict__[name] = known[id(value)]
    return cast(Root, twin)  # a copy, where nothing stands in the place of the root itself


def _shadow(module: nn.Module, replacements: Mapping[int, Replacement], known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    if id(module) in replacements:
        known[id(module)] = replacements[id(module)](module)
        return known[id(module)]
    twin = known[id(module)] = _copy(module)
    if twin._compiled_call_impl is not None:
        raise UnsupportedModelError(
            f"a {type(module).__name__} of this model was compiled in place, for the model's weights of now; leave out "
            "module.compile(), and let the stages compile their layers (torch_compile=True)"
        )
    forward = twin.__dict__.get("forward")
    if hasattr(module, "_hf_hook") and "_old_forward" in vars(module):
        forward = module._old_forward  # accelerate's hook would move tensors
        del twin._hf_hook
    # accelerate leaves an instance attribute `forward` behind when it removes its hooks; bound to the original, it
    # would compute with the original's weights instead of the shadow's.
    if forward is not None and getattr(forward, "__self__", None) is module and not _holds_method_of(forward, module):
        twin.forward = MethodType(forward.__func__, twin)
    elif forward is not None:
        shown = " ".join(repr(forward).split())
        raise UnsupportedModelError(
            f"the forward of a {type(module).__name__} of this model was replaced by {shown:.80}, which would "
            "compute with the model's weights of now; undo the replacement (del module.forward) before the model is split. "
            "Trainers of TRL leave one behind: give the model to OuroborosTrainer, or to hf_ouroboros.trl, before"
        )
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    twin._modules = {
        name: child if child is None else _shadow(child, replacements, known) for name, child in module._modules.items()
    }
    return twin


def _holds_method_of(forward: Any, module: nn.Module) -> bool:
    """Whether a forward is a function around another one that is bound to the module."""
    cells = getattr(forward.__func__, "__closure__", None) or ()
    return any(getattr(cell.cell_contents, "__self__", None) is module for cell in cells if cell != CellType())


def _copy(module: nn.Module) -> nn.Module:
    """A shallow copy, also of a parametrized module, which refuses to be copied."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    return twin


def hollow(module: nn.Module, known: dict[int, nn.Module] | None = None) -> nn.Module:
    """A copy without parameters, buffers and hooks, but with class, plain attributes and hollow children.

    A model may look at its layers' attributes (`layer.attention_type`) without running them.

    Args:
        module: the original.
        known: copies made so far, by the original's id.
    """
    known = {} if known is None else known
    if id(module) in known:
        return known[id(module)]
    twin = known[id(module)] = _copy(module)
    for name in hook_dicts(twin):
        twin.__dict__[name] = type(twin.__dict__[name])()
    for name in ("forward", "_hf_hook", "_old_forward", "_compiled_call_impl", "quant_state"):
        twin.__dict__.pop(name, None)
    twin._parameters, twin._buffers = {}, {}
    twin._modules = {n: child if child is None else hollow(child, known) for n, child in module._modules.items()}
    return twin


def on_meta(module: nn.Module, hooks: bool = True) -> nn.Module:
    """A shadow on the meta device: parameters and buffers of the same shapes, without memory, all to be trained.

    Args:
        module: the original.
        hooks: whether it has the original's.
    """
    stands_for = {id(part): unpacked for _, part in packed_linears(module)}
    twin = _with_parameters(module, lambda parameter: torch.empty_like(parameter.data, device="meta"), stands_for)
    for part in twin.modules():
        part._buffers = {name: None if b is None else b.to("meta") for name, b in part._buffers.items()}
        for name in () if hooks else hook_dicts(part):
            part.__dict__[name] = type(part.__dict__[name])()
    return twin


def detached(module: nn.Module) -> nn.Module:
    """A shadow with parameters of its own, all to be trained, that have the original's values and memory.

    Packed matrices, which are more than their values, are the original's.
    """
    packed = {id(part.weight) for _, part in packed_linears(module)}
    return _with_parameters(module, lambda parameter: parameter.data, kept=packed)


def _with_parameters(
    module: nn.Module,
    values: Callable[[nn.Parameter], torch.Tensor],
    replacements: Mapping[int, Replacement] | None = None,
    kept: Collection[int] = (),
) -> nn.Module:
    twin = shadow(module, replacements, own_hooks=True)
    parameters: dict[int, nn.Parameter] = {}
    for part in twin.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                if id(parameter) not in parameters:
                    trained = parameter.is_floating_point()
                    parameters[id(parameter)] = nn.Parameter(values(parameter), requires_grad=trained)
                part._parameters[name] = parameters[id(parameter)]
    return twin


def hook_dicts(module: nn.Module) -> list[str]:
    """Names of the attributes in which a module keeps its hooks."""
    return [name for name in vars(module) if name.endswith(("_hooks", "_hooks_with_kwargs"))]


# ---- tensors in nested arguments ----


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """All tensors in nested containers, with their places."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, (tuple, list)):
        for i, value in enumerate(tree):
            yield from leaves(value, (*path, i))


def leaf(tree: Any, path: Path) -> Any:
    """What is at a place; None if the containers end before."""
    for key in path:
        if isinstance(tree, Mapping) and key not in tree:
            return None
        tree = tree[key]
    return tree


def with_leaf(tree: Any, path: Path, value: Any) -> Any:
    """The containers with another value at a place.

    Mappings are written in place, as layers may share them with each other; missing containers on the way are made.
    """
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(tree, MutableMapping):
        if rest and key not in tree:
            tree[key] = (None,) * (rest[0] + 1) if isinstance(rest[0], int) else {}
        tree[key] = with_leaf(tree.get(key), rest, value)
        return tree
    items = list(tree or ())
    items += [None] * (key + 1 - len(items))
    items[key] = with_leaf(items[key], rest, value)
    return (type(tree) if tree else tuple)(items)


def map_leaves(tree: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """The containers with every tensor replaced."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, MutableMapping):
        twin = copy.copy(tree)  # also of transformers' ModelOutput
        for key, value in tree.items():
            twin[key] = map_leaves(value, function)
        return twin
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_leaves(value, function) for value in tree)
    return tree
