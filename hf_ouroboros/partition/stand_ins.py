"""What stands in a stage's shadow for modules of other stages: shapes without values, and nothing done."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .meta import Answers
from .shadow import hollow


def output_on_meta(module: nn.Module, given: Any) -> Any:
    """What a module on the meta device puts out for (args, kwargs)."""
    for scope in (nullcontext, Answers):
        try:
            with torch.no_grad(), scope():
                return module(*given[0], **given[1])
        except RuntimeError:  # it asks for values, e.g. whether all of a mask is true
            if scope is Answers:
                raise
    return None


def identity(module: nn.Module) -> nn.Module:
    """A hollow module that gives on its first argument."""
    twin = hollow(module)
    twin.forward = lambda value, *args, **kwargs: value
    return twin


def without_values(module: nn.Module) -> nn.Module:
    """A hollow module whose parameters can still be asked for shape and dtype (`embedding.weight.dtype`)."""
    twin = hollow(module)
    for mine, theirs in zip(twin.modules(), module.modules(), strict=True):
        for name, parameter in theirs._parameters.items():
            mine.__dict__[name] = None if parameter is None else nothing(parameter)
        mine._buffers = dict(theirs._buffers)
    return twin


def nothing(like: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Zeros of a shape, which take no memory."""
    return torch.zeros((), dtype=like.dtype, device=device or "cpu").expand(like.shape)
