"""Weights that are NaN or infinite, by name: nothing that is computed with them means anything."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .packed import packed_linears


@torch.no_grad()
def check_finite(model: nn.Module) -> None:
    """Refuses parameters with NaN or infinite elements, as far as this process holds them.

    Raises:
        UnsupportedModelError: names the first of them.
    """
    packed = {id(module.weight) for _, module in packed_linears(model)}  # bits, of whatever dtype
    for name, parameter in model.named_parameters():
        values = parameter.is_floating_point() and not parameter.is_meta and id(parameter) not in packed
        if not values or parameter.sum().isfinite():
            continue
        bad = parameter.numel() - int(parameter.isfinite().sum())  # a sum of finite numbers may overflow
        if bad:
            raise UnsupportedModelError(
                f"the parameter {name} of this {type(model).__name__} has {bad} NaN or infinite elements of "
                f"{parameter.numel()}; load or initialise the model anew, from a checkpoint before it diverged"
            )
