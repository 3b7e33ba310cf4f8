"""Units, the smallest placeable parts of a model, and spans of them: the vocabulary of the splitter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """The smallest placeable part of a model: the embeddings together, each layer, the final norm, the head.

    Args:
        modules: full names of its modules; they always stay together.
        kind: "embedding", "layer" or "head".
        cost: relative compute time of forward plus backward.
        parameter_bytes: bytes of its parameters, a tied matrix counted at the embedding only.
    """

    modules: tuple[str, ...]
    kind: str
    cost: float = 1.0
    parameter_bytes: int = 0


@dataclass(frozen=True)
class StageSpan:
    """Stage `index` holds `units[start:stop]` and runs on `devices[device]`."""

    index: int
    start: int
    stop: int
    device: int


def count_layers(units: Sequence[Unit]) -> int:
    """How many of the units are layers."""
    return sum(unit.kind == "layer" for unit in units)


def spans_of_runs(assigned: Sequence[int]) -> list[StageSpan]:
    """One stage per run of units on the same device.

    Args:
        assigned: device index of every unit, in execution order.
    """
    bounds = [0] + [i for i in range(1, len(assigned)) if assigned[i] != assigned[i - 1]] + [len(assigned)]
    return [StageSpan(k, a, b, assigned[a]) for k, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]
