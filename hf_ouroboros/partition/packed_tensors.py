"""Packed matrices that are tensors of a kind of their own: int8, of weights only, by torchao and by quanto.

    torchao    Int8Tensor            `qdata` [out, in], `scale` and `zero_point` of a row or of the whole    in a plain nn.Linear
    quanto     WeightQBytesTensor    `_data` [out, in], `_scale` of a row                                    in a QLinear

Such a weight says the shape and dtype of the matrix that it stands for. Without values it is a tensor of its kind, of tensors on
the meta device. Libraries are asked only where somebody has imported them.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import nn

TORCHAO, QUANTO = "torchao", "quanto"
MODULES = ("torchao.quantization", "optimum.quanto")
TENSORS = {"Int8Tensor": ("qdata", "scale", "zero_point"), "WeightQBytesTensor": ("_data", "_scale")}


def is_own_kind(tensor: Any) -> bool:
    """Whether this is a matrix that torchao or quanto has packed with a byte per element, with or without values."""
    name = type(tensor).__name__
    return name in TENSORS and any(type(tensor) is getattr(sys.modules.get(m), name, None) for m in MODULES)


def objection(weight: torch.Tensor) -> str | None:
    """What of a packed matrix stages were not compared with; None for nothing."""
    matrix: Any = weight
    if any(getattr(matrix, of, None) is not None for of in ("act_quant_kwargs", "act_pre_scale", "activation_qtype")):
        return "rounds its input, too, through which no gradient flows to the stages and adapters below"
    if hasattr(matrix, "qtype"):
        return (
            None
            if matrix.qtype.name == "qint8" and matrix.axis == 0
            else f"is of the kind {matrix.qtype.name}, not int8"
        )
    if matrix.dim() != 2 or matrix.block_size[-1] != matrix.shape[-1]:
        return "has scales for groups within a row, not for whole rows"
    return None


def tensors_of(weight: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a packed matrix consists of: its rows, then their scales and zeros."""
    found = [getattr(weight, name) for name in TENSORS[type(weight).__name__]]
    return [tensor for tensor in found if tensor is not None]


def emptied(parameter: nn.Parameter) -> nn.Parameter:
    """The same without values, on the meta device."""
    empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
    notes = {key: value for key, value in vars(parameter).items() if key not in vars(empty)}
    vars(empty).update(notes)  # what others noted on it; what it consists of it has anew
    return empty


def place(parameter: torch.Tensor, device: torch.device) -> None:
    """Moves a packed matrix, which stays the same object; what is assigned to its `data` would be lost."""
    if parameter.device != device:
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.to(device), requires_grad=False))


class LeanLinear(nn.Linear):
    """A linear module whose pending backwards hold on to its packed matrix, where torchao's keep one that is unpacked each.

    Numbers are torchao's: integers up to 127 are exact in every floating dtype.
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The product, as torchao computes it."""
        weight: Any = self.weight
        unpacked = (self.in_features, self.out_features), (1, self.in_features)

        def keep(tensor: torch.Tensor) -> torch.Tensor | torch.dtype:
            return tensor.dtype if (tuple(tensor.shape), tensor.stride()) == unpacked else tensor

        def again(kept: torch.Tensor | torch.dtype) -> torch.Tensor:
            return cast(torch.Tensor, weight.qdata.t().to(kept)) if isinstance(kept, torch.dtype) else kept

        with torch.autograd.graph.saved_tensors_hooks(keep, again):
            return super().forward(values)


def make_lean(module: nn.Module) -> None:
    """Lets a linear module of torchao's matrix keep it packed for its backwards."""
    if type(module) is nn.Linear:
        module.__class__ = LeanLinear
