"""Packed matrices that are tensors of a kind of their own: torchao's int8, of weights only.

The weight of a plain linear module says the shape and dtype of the matrix that it stands for, and holds its rows as int8
`qdata` [out, in] with a `scale` and a `zero_point` per row, or of the whole. Without values it is such a tensor of tensors on
the meta device. torchao is asked only where somebody has imported it.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import nn

TORCHAO = "torchao"


def is_own_kind(tensor: Any) -> bool:
    """Whether this is a matrix that torchao has packed as int8, with or without values."""
    kind: Any = getattr(sys.modules.get("torchao.quantization"), "Int8Tensor", None)
    return kind is not None and type(tensor) is kind


def objection(weight: torch.Tensor) -> str | None:
    """What of a packed matrix stages were not compared with; None for nothing."""
    matrix: Any = weight
    if getattr(matrix, "act_quant_kwargs", None) is not None or getattr(matrix, "act_pre_scale", None) is not None:
        return "rounds its input, too, through which no gradient flows to the stages and adapters below"
    if matrix.dim() != 2 or matrix.block_size[-1] != matrix.shape[-1]:
        return "has scales for groups within a row, not for whole rows"
    return None


def tensors_of(weight: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a packed matrix consists of: its rows, then their scales and zeros."""
    matrix: Any = weight
    return [tensor for tensor in (matrix.qdata, matrix.scale, matrix.zero_point) if tensor is not None]


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
