"""Autocast on the meta device, which has none: products are computed in bfloat16, and what they multiply by is converted before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..partition.multiplied import multiplied

DTYPE = torch.bfloat16
_PRODUCTS = frozenset(
    getattr(owner, name)
    for name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "__matmul__")
    for owner in (torch, torch.Tensor)
    if hasattr(owner, name)
) | {F.linear, F.scaled_dot_product_attention}


class Autocasting(TorchFunctionMode):
    """Lowers what goes into products.

    Args:
        model: whose weights are converted once per version, where they are only multiplied by.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        places, named = multiplied(model), dict(model.named_parameters(remove_duplicate=False))
        self._copied = {id(named[place]) for place in places if place in named}
        self._converted: dict[int, torch.Tensor] = {}
        self._know: Callable[[torch.Tensor], None] = lambda tensor: None

    @contextmanager
    def telling(self, know: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """One forward.

        Args:
            know: told the copies of weights that micro-batches share.
        """
        self._know = know
        try:
            with self:
                yield
        finally:
            self._converted = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _PRODUCTS:
            args, kwargs = tree_map_only(torch.Tensor, self.lowered, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def lowered(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a product takes instead of a tensor."""
        if tensor.dtype != torch.float32:
            return tensor
        if not isinstance(tensor, nn.Parameter):
            return tensor.to(DTYPE)
        if id(tensor) not in self._converted:
            self._converted[id(tensor)] = tensor.to(DTYPE)
            if id(tensor) in self._copied:
                self._know(self._converted[id(tensor)])
        return self._converted[id(tensor)]
