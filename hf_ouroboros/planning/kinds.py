"""Layers that are alike: of each kind, one has to be counted or measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def layer_kinds(layers: Sequence[nn.Module]) -> list[int]:
    """For every layer, the index of the first one that is like it."""
    first: dict[Any, int] = {}
    return [first.setdefault(kind_of(layer), i) for i, layer in enumerate(layers)]


def kind_of(layer: nn.Module) -> Any:
    """What tells layers apart: classes and shapes inside of them, and the settings that are words or switches."""
    return tuple(
        (
            name,
            type(module),
            tuple((n, None if p is None else p.shape) for n, p in module._parameters.items()),
            tuple(
                (n, value)
                for n, value in sorted(vars(module).items())
                if value is None or (isinstance(value, (str, bool)) and n != "training")
            ),
        )
        for name, module in layer.named_modules()
    )
