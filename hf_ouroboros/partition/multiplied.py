"""Which weights a stage only multiplies by, so that under autocast a copy in lower precision is all that is used of them."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

_MULTIPLYING = (nn.Linear, Conv1D)
"""Modules that only multiply by their weights, which is what autocast does in its lower precision."""

_LOOKING = ("peft",)
"""Libraries whose layers ask weights for their precision, and compute otherwise where it is another one."""


def multiplied(module: nn.Module) -> set[str]:
    """The places, as "layer.weight", whose parameters may be exchanged for copies in autocast's precision."""
    parts = dict(module.named_modules())
    looked_at = tuple(f"{name}." for name, part in parts.items() if type(part).__module__.split(".")[0] in _LOOKING)
    return {
        f"{name}.{parameter}"
        for name, part in parts.items()
        if type(part) in _MULTIPLYING and not f"{name}.".startswith(looked_at)
        for parameter, value in part._parameters.items()
        if value is not None
    }
