"""Layers of a stage under torch.compile: their own forward, compiled, with whatever weights it is called with.

Only the layers are compiled. What the model does around them (masks, positions, the loss) runs as ever, and so do the places where a
stage begins and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .shadow import Path, leaf, map_leaves


@dataclass(frozen=True)
class Compilation:
    """How layers are compiled, see `torch.compile`.

    Args:
        backend: what makes kernels of graphs.
        mode: of the backend; None for its default.
    """

    backend: str
    mode: str | None = None


def compiled(layer: nn.Module, number: int, hidden: Path, compilation: Compilation) -> Callable[..., Any]:
    """What a layer computes when it is called, its hooks included, compiled.

    Rows and lengths are dynamic from the first batch on: kernels must not depend on which length came first, or a resumed run would
    be another one. Sizes of weights are not.

    Args:
        layer: it is run with the parameters that it has when it is called.
        number: of the layer in the model.
        hidden: which of its arguments is the hidden state [rows, length, width].
        compilation: how.
    """

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return layer._call_impl(*args, **kwargs)

    # torch limits how often the same code is compiled, and all layers share theirs; so each gets some of its own.
    call.__code__ = call.__code__.replace(co_name=f"layer_{number}")
    run = torch.compile(call, backend=compilation.backend, mode=compilation.mode)

    def compiled_call(*args: Any, **kwargs: Any) -> Any:
        sizes = leaf((args, kwargs), hidden).shape[:2]
        return run(*map_leaves((args, kwargs), partial(_dynamic, sizes=sizes)))

    return compiled_call


def _dynamic(value: torch.Tensor, sizes: Collection[int]) -> torch.Tensor:
    """A tensor of the plain kind, as compilers know them, whose rows and lengths are marked."""
    if type(value) is not torch.Tensor:
        value = value.as_subclass(torch.Tensor)
    for dimension, size in enumerate(value.shape):
        if size > 1 and size in sizes:
            torch._dynamo.maybe_mark_dynamic(value, dimension)
    return value
