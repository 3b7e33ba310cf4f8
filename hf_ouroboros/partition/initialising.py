"""Initialises only the owned parameters of a new model, with the values that the whole model would have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError, UnsupportedOptionError
from .ownership import Owned, check_owned, names_of_parameters, release_foreign

PIECE = 1 << 20  # elements; a multiple of 16, see `draw_in_pieces`

# Functions of torch.nn.init that fill their tensor by one draw per element, and nothing else that needs memory.
FILLS = {"normal_": "normal_", "uniform_": "uniform_", "kaiming_uniform_": "uniform_"}


def initialise_owned(
    config: PretrainedConfig,
    owned: Owned,
    build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config,
    **kwargs: Any,
) -> PreTrainedModel:
    """Builds a new model of which only the owned parameters have values; the others are on the meta device.

    Under the same seed the owned parameters and the CPU generator afterwards are, to the last bit, those of
    `build(config, **kwargs)`, so every process of a run can make its part. How:

        1. a dry construction on the meta device     which parameter is registered when, and what its name will be
        2. the construction itself                   each foreign parameter gets, when it is registered, memory that
                                                     all of them share; initialisers run on it as on any other
        3. release                                   foreign parameters go to the meta device

    Initialisers thus draw what they always draw, even where that depends on the values (`trunc_normal_`). The common
    ones don't fill the shared memory but draw piece by piece into its beginning.

    Memory: the owned parameters and 2^20 elements; rare initialisers take one foreign tensor instead.

    Args:
        config: configuration of the model.
        owned: whether this process owns the parameter of that name, as in `model.named_parameters()`; a tied matrix
            is owned if it is under any of its names.
        build: what makes a model of a configuration: `from_config` of an Auto class, or a model class.
        kwargs: passed on, e.g. `dtype` to `from_config`.

    Returns:
        The model, on CPU.

    Raises:
        UnsupportedOptionError: the default device is not the CPU.
        UnsupportedModelError: the model copies foreign parameters into others, or does not register its parameters
            the same way on the meta device.
    """
    if torch.get_default_device().type != "cpu":
        raise UnsupportedOptionError(
            f"the default device is {torch.get_default_device()}; a model is initialised in parts with the CPU's "
            "random numbers, so make it without torch.set_default_device or a `with torch.device(...)` around it"
        )
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _Registrations() as dry:
        skeleton = build(copy.deepcopy(config), **kwargs)
    expected = dry.named(skeleton)
    foreign = _foreign_registrations(skeleton, dry, expected, owned)
    scratch = _Scratch(max((_span_bytes(dry.seen[i].parameter) for i in foreign), default=0))
    del skeleton, dry

    def displace(index: int, parameter: nn.Parameter) -> None:
        if index in foreign and _kind(parameter) == expected[index][1:]:
            parameter.data = scratch.alias(parameter)

    with _Registrations(displace) as real, _ForeignDraws(scratch):
        model = build(config, **kwargs)
    if real.named(model) != expected:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not register the same parameters on the meta device as on the CPU; it can't "
            "be initialised in parts, please report it, and run it in one process"
        )
    registered = {id(seen.parameter) for i, seen in enumerate(real.seen) if i not in foreign}
    for parameter, names in names_of_parameters(model):
        if any(owned(name) for name in names) and (id(parameter) not in registered or scratch.holds(parameter)):
            raise UnsupportedModelError(
                f"{type(model).__name__} makes its parameter {names[0]} of other parameters; it can't be initialised "
                "in parts, please report it, and run it in one process"
            )
    del real
    release_foreign(model, owned)
    check_owned(model, owned)
    return model


def draw_in_pieces(fill: str, numel: int, memory: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Advances the CPU generator as `fill` on a contiguous tensor would, without the memory of that tensor.

    `normal_` draws in blocks of 16 and, if 16 does not divide the size, draws the last 16 once more; less than 16
    elements it draws in another way. So of several pieces, all but the last are multiples of 16, and the last has at
    least 16.

    Args:
        fill: name of a Tensor method that draws once per element: "normal_" or "uniform_".
        numel: size of the tensor.
        memory: at least PIECE + 16 contiguous elements of the tensor's dtype.
        generator: the generator; None for the default one.
    """
    while numel:
        piece = numel if numel < PIECE + 16 else PIECE
        getattr(memory[:piece], fill)(generator=generator)
        numel -= piece


class _Registration(NamedTuple):
    module: nn.Module
    leaf: str
    parameter: nn.Parameter


class _Registrations:
    """Sees, while it is entered, each parameter when a module registers it for the first time.

    Args:
        displace: called with the registration's number and the parameter.
    """

    def __init__(self, displace: Callable[[int, nn.Parameter], None] | None = None):
        self.seen: list[_Registration] = []  # holds the parameters, so that no id is used twice
        self._known: set[int] = set()
        self._displace = displace

    def __enter__(self) -> _Registrations:
        self._handle = register_module_parameter_registration_hook(self._register)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def named(self, model: nn.Module) -> list[tuple[str | None, torch.Size, torch.dtype]]:
        """Name in the model, shape and dtype of each registration; modules that the model did not keep have no name."""
        names: dict[int, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), f"{name}." if name else "")
        return [
            (f"{names[id(module)]}{leaf}" if id(module) in names else None, *_kind(parameter))
            for module, leaf, parameter in self.seen
        ]

    def _register(self, module: nn.Module, leaf: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or id(parameter) in self._known:  # e.g. no bias; a matrix being tied
            return
        if self._displace is not None:
            self._displace(len(self.seen), parameter)
        self._known.add(id(parameter))
        self.seen.append(_Registration(module, leaf, parameter))


class _Scratch:
    """Memory that all foreign parameters share while they are initialised; what is never written takes no memory."""

    def __init__(self, nbytes: int):
        self.memory = torch.empty(max(nbytes, (PIECE + 16) * 8), dtype=torch.uint8)

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same dtype, shape and strides in this memory."""
        alias = torch.empty(0, dtype=tensor.dtype)
        return alias.set_(self.memory.untyped_storage(), 0, tensor.shape, tensor.stride())

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor lies in this memory."""
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            return False
        return tensor.untyped_storage().data_ptr() == self.memory.untyped_storage().data_ptr()

    def front(self, dtype: torch.dtype) -> torch.Tensor:
        """The beginning of the memory: PIECE + 16 elements of a dtype."""
        return self.memory[: (PIECE + 16) * dtype.itemsize].view(dtype)


class _ForeignDraws(TorchFunctionMode):
    """Initialises foreign parameters without filling them, and refuses to take owned values from them."""

    def __init__(self, scratch: _Scratch):
        super().__init__()
        self.scratch = scratch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        fill = FILLS.get(name)
        # transformers puts its own functions, of the same names, into torch.nn.init while it initialises.
        if fill and getattr(func, "__module__", "") in ("torch.nn.init", "transformers.initialization"):
            tensor = args[0] if args else kwargs["tensor"]
            if self.scratch.holds(tensor) and tensor.is_contiguous():
                draw_in_pieces(fill, tensor.numel(), self.scratch.front(tensor.dtype), kwargs.get("generator"))
                return tensor
        elif func is torch.Tensor.copy_ and not self.scratch.holds(args[0]):
            if any(self.scratch.holds(value) for value in (*args[1:], *kwargs.values())):
                raise UnsupportedModelError(
                    "the model's initialisation copies a parameter that this process does not own; it can't be "
                    "initialised in parts, please report it, and run it in one process"
                )
        return func(*args, **kwargs)


def _foreign_registrations(
    model: nn.Module, registrations: _Registrations, named: list[tuple[str | None, Any, Any]], owned: Owned
) -> set[int]:
    """Numbers of the registrations whose values this process does not need."""
    final = dict(model.named_parameters(remove_duplicate=False))
    mine = {id(p) for p, names in names_of_parameters(model) if any(owned(name) for name in names)}
    # What tying replaces (a head's own matrix) is drawn, but needed by nobody.
    return {
        i
        for i, ((name, *_), seen) in enumerate(zip(named, registrations.seen, strict=True))
        if name in final and (final[name] is not seen.parameter or id(final[name]) not in mine)
    }


def _kind(parameter: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return parameter.shape, parameter.dtype


def _span_bytes(tensor: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.dtype.itemsize
