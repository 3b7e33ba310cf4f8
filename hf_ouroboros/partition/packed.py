"""Packed matrices: linear modules of bitsandbytes, whose weights are not what their shapes say, of torchao, of quanto.

    nf4, fp4    Params4bit [elements / 2, 1], uint8    scales in `quant_state`, which the weight and its module know
    int8        Int8Params [out, in], int8             scales at the weight; at the module's `state` after its first forward
    torchao, quanto    tensors of their own kind       `packed_tensors.py`

A packed matrix is frozen, so it has one version, and stages compute with the very object. Its costs are those of the matrix
that it stands for. bitsandbytes is asked only where somebody has imported it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from .packed_tensors import MODULES, is_own_kind, tensors_of
from .packed_tensors import place as place_own_kind

if TYPE_CHECKING:

    class PackedLinear(nn.Linear):
        """What is used of bitsandbytes' linear modules: `Linear4bit` has the two of `quant`, `Linear8bitLt` has `state`."""

        quant_state: Any
        quant_storage: torch.dtype
        state: Any
        support_avx512bf16_for_cpu: bool


BLOCK, STATES = 64, 256
"""Elements that share a scale; scales, packed themselves (double quantization), that share one."""
_OF_VALUES = frozenset({"quant_state", "module", "CB", "SCB"})
"""What bitsandbytes notes on a weight that is, or holds, its values; the rest is how it was packed."""


class Size(NamedTuple):
    """Elements of a matrix, and bytes as it is held, scales included."""

    elements: int
    bytes: int


def packed_bytes(elements: int, rows: int, bits: int, nested: bool = False) -> int:
    """Bytes of a packed matrix with its scales.

    Args:
        elements: of the matrix.
        rows: how many of them are rows.
        bits: 4 or 8.
        nested: whether 4-bit scales are packed themselves.
    """
    if bits == 8:
        return elements + 4 * rows
    scales = math.ceil(elements / BLOCK)
    return math.ceil(elements / 2) + (scales + 4 * math.ceil(scales / STATES) if nested else 4 * scales)


def packed_linears(module: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """The packed linear modules inside a module, by name."""
    if not {"bitsandbytes", *MODULES} & sys.modules.keys():
        return iter(())
    return ((name, cast("PackedLinear", part)) for name, part in module.named_modules() if is_packed(part))


def is_packed(module: nn.Module) -> bool:
    """Whether this is a linear module with a packed weight, which a stand-in for another stage's does not have."""
    kinds = _kinds()
    if isinstance(module, nn.Linear) and is_own_kind(module._parameters.get("weight")):
        return True
    if not kinds or not isinstance(module, kinds) or module._parameters.get("weight") is None:
        return False
    return _bits(module) == 4 or not cast("PackedLinear", module).state.has_fp16_weights


def sizes(parameters: Iterable[nn.Parameter], module: nn.Module) -> dict[int, Size]:
    """What parameters really are, by their id.

    Args:
        parameters: some of a module's, with or without values.
        module: of which they are.
    """
    found = {id(p): Size(p.numel(), p.numel() * p.element_size()) for p in parameters}
    for _, part in packed_linears(module):
        if id(part.weight) in found:
            elements = part.in_features * part.out_features
            if is_own_kind(part.weight):
                size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(part.weight))
                found[id(part.weight)] = Size(elements, size)
                continue
            nested = bool(getattr(part.weight, "compress_statistics", False))
            size = packed_bytes(elements, part.out_features, _bits(part), nested)
            found[id(part.weight)] = Size(elements, size)
    return found


class Unpacked(nn.Linear):
    """A linear module without values that stands for a packed one where only shapes and dependencies count."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The shape of the product; like a packed matrix, it leaves the dtype of its input."""
        bias = None if self.bias is None else self.bias.to(values.dtype)
        return F.linear(values, self.weight.to(values.dtype), bias)


def unpacked(module: nn.Module) -> Unpacked:
    """Stands for a packed linear module on the meta device."""
    packed = cast("PackedLinear", module)
    return Unpacked(packed.in_features, packed.out_features, packed.bias is not None, device="meta")


def scales(module: PackedLinear) -> list[torch.Tensor]:
    """The scales of a packed linear module, wherever they are by now; empty where its values are not here."""
    weight = module.weight
    found: list[torch.Tensor | None]
    if is_own_kind(weight):
        found = [*tensors_of(weight)[1:]]
    elif _bits(module) == 8:
        found = [getattr(weight, "SCB", None), module.state.SCB]
    else:
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        inner = getattr(state, "state2", None)
        found = [getattr(state, "absmax", None), getattr(state, "offset", None), getattr(inner, "absmax", None)]
    return [tensor for tensor in found if tensor is not None and not tensor.is_meta]


def values(module: PackedLinear) -> list[torch.Tensor]:
    """The tensors that a packed linear module's matrix consists of: the packed bits, then their scales."""
    weight = module.weight
    return [tensors_of(weight)[0] if is_own_kind(weight) else weight.detach(), *scales(module)]


def place(module: nn.Module, device: torch.device) -> None:
    """Lets the scales of bitsandbytes' matrices follow their weights, which are on the device already; moves others."""
    for _, part in packed_linears(module):
        weight = part.weight
        if is_own_kind(weight):
            place_own_kind(weight, device)
            continue
        if _bits(part) == 4:
            if (state := getattr(weight, "quant_state", None)) is not None:
                state.to(device)
                part.quant_state = state
            continue
        holders: tuple[Any, ...] = (weight, part.state)
        for holder in holders:
            if getattr(holder, "SCB", None) is not None:
                holder.SCB = holder.SCB.to(device)
            if getattr(holder, "CB", None) is not None:
                holder.CB = weight.data


def forget_foreign(module: nn.Module) -> None:
    """Drops what is left of packed matrices whose weights are on the meta device, which then have their packed shapes."""
    for _, part in packed_linears(module):
        weight = part.weight
        if not weight.is_meta or is_own_kind(weight):
            continue
        notes = {key: value for key, value in vars(weight).items() if key not in _OF_VALUES}
        bitsandbytes = sys.modules["bitsandbytes"]
        shape: tuple[int, int]
        dtype: torch.dtype
        if _bits(part) == 8:
            part.state.reset_grads()
            kind, shape, dtype = bitsandbytes.nn.Int8Params, (part.out_features, part.in_features), torch.int8
            notes |= {"CB": None, "SCB": None}
        else:
            part.quant_state = None
            kind, dtype = bitsandbytes.nn.Params4bit, part.quant_storage
            shape = (math.ceil(part.in_features * part.out_features / 2 / dtype.itemsize), 1)
            notes |= {"quant_state": None, "module": part}
        if tuple(weight.shape) != shape or weight.dtype != dtype:
            empty = torch.empty(shape, dtype=dtype, device="meta")
            weight = part.weight = torch.Tensor._make_subclass(kind, empty, False)
        weight.__class__ = kind  # of the same object, where it was released
        vars(weight).clear()
        vars(weight).update(notes)


def _kinds() -> tuple[type, ...]:
    bitsandbytes = sys.modules.get("bitsandbytes")
    layers: Any = getattr(bitsandbytes, "nn", None)
    return () if layers is None else (layers.Linear4bit, layers.Linear8bitLt)


def _bits(module: nn.Module) -> int:
    return 4 if isinstance(module, _kinds()[0]) else 8
