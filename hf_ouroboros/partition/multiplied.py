"""Which weights a stage only multiplies by, so that under autocast a copy in lower precision is all that is used of them."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

MULTIPLYING = (nn.Linear, Conv1D)
"""Modules that only multiply by their weights, which is what autocast does in its lower precision."""

_LOOKING = ("peft",)
"""Libraries whose layers ask weights for their precision, and compute otherwise where it is another one."""

_CALLING = frozenset(
    f"peft.tuners.{kind}"
    for kind in (
        "fourierft.layer.FourierFTLinear",
        "ia3.layer.Linear",
        "loha.layer.Linear",
        "lokr.layer.Linear",
        "lora.layer.Linear",
        "oft.layer.Linear",
        "vera.layer.Linear",
    )
)
"""Of these, layers that do nothing in training with the weights of the module below the adapter but call it."""


def multiplied(module: nn.Module) -> set[str]:
    """The places, as "layer.weight", whose parameters may be exchanged for copies in autocast's precision."""
    parts = dict(module.named_modules())
    looked_at = tuple(f"{inner}." for name, part in parts.items() for inner in _looked_at(name, part))
    return {
        f"{name}.{parameter}"
        for name, part in parts.items()
        if type(part) in MULTIPLYING and not f"{name}.".startswith(looked_at)
        for parameter, value in part._parameters.items()
        if type(value) is nn.Parameter
    }


def _looked_at(name: str, part: nn.Module) -> list[str]:
    """Names of the modules in which a part of a model may ask weights for their precision."""
    kind = type(part)
    if kind.__module__.split(".")[0] not in _LOOKING:
        return []
    if f"{kind.__module__}.{kind.__qualname__}" not in _CALLING or not _is_plain(part):
        return [name]
    return [f"{name}.{child}" for child, _ in part.named_children() if child != "base_layer"]


def _is_plain(layer: nn.Module) -> bool:
    """Whether none of a layer's adapters computes with the weights below it (DoRA), or was merged and may be taken out again."""
    return not getattr(layer, "lora_variant", None) and not getattr(layer, "merged_adapters", None)
