"""Layer counts per stage that keep the busiest device as little busy as possible: exact, by dynamic programming.

Stages 0 .. K-1 take contiguous runs of the layers. With c(k, i, j) the load of stage k with layers i .. j-1, the
best bottleneck of stages a .. k that cover layers i .. j-1 is

    best(k, j) = min over i of max(best(k-1, i), c(k, i, j))

Where first and last stage share a device, their loads add up: every size of the first stage is tried with every
size of the last, and the recursion runs over the stages between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..schedules.programs import has_simple_devices, stages_by_device


@dataclass(frozen=True)
class Load:
    """Something that a stage brings to its device (time, bytes), a sum over its layers and a part of its own.

    Args:
        layers: [stage][layer]: what this layer costs in this stage.
        fixed: [stage]: what the stage costs besides (embedding, head).
    """

    layers: Sequence[Sequence[float]]
    fixed: Sequence[float]

    def _matrix(self, stage: int) -> np.ndarray:
        """[start, stop] -> load."""
        prefix = np.concatenate(([0.0], np.cumsum(np.asarray(self.layers[stage], dtype=float))))
        return prefix[None, :] - prefix[:, None] + self.fixed[stage]


class NoSplitError(ValueError):
    """No contiguous split keeps within the limits."""


def best_counts(
    placement: Sequence[int],
    time: Load,
    memory: Load | None = None,
    limits: Sequence[float] | None = None,
) -> list[int]:
    """Splits the layers into contiguous stages so that the busiest device's time is minimal.

    Exact when every device holds one stage, or one device holds the first and the last one. Where devices hold more stages than
    that, stages are balanced first, those of one device to equal parts of its work, and then layers go from stage to stage as long
    as that makes the busiest device less busy.

    Args:
        placement: device of each stage; its length is the number of stages K.
        time: of the stages on their devices, not negative.
        memory: of the stages, not negative; None where there is room enough.
        limits: what fits into each device, in the unit of `memory`.

    Returns:
        Layers per stage. Every stage but the last has at least one, the last may be the head alone. Of equally good
        splits, the one with the most layers in the last and then the fewest in the first stage.

    Raises:
        ValueError: more stages than layers + 1.
        NoSplitError: nothing fits.
    """
    stages, layers = len(placement), len(time.layers[0])
    if stages > layers + 1:
        raise ValueError(f"{stages} stages need at least {stages - 1} layers, not {layers}")
    if not has_simple_devices(stages_by_device(placement)):
        return _counts_of_many(placement, time, memory, limits)
    room = [np.inf if memory is None or limits is None else limits[d] for d in placement]

    def matrix(stage: int, load: Load | None) -> np.ndarray:
        """[start, stop] -> load; infinite for what is no stage."""
        loads = np.zeros((layers + 1, layers + 1)) if load is None else load._matrix(stage)
        least = 0 if stage == stages - 1 else 1
        return np.where(np.subtract.outer(np.arange(layers + 1), np.arange(layers + 1)) <= -least, loads, np.inf)

    def alone(stage: int) -> np.ndarray:
        """[start, stop] -> time; infinite where the stage does not fit into its device."""
        return np.where(matrix(stage, memory) <= room[stage], matrix(stage, time), np.inf)

    if stages == 1:
        if not np.isfinite(alone(0)[0, layers]):
            raise NoSplitError("the model does not fit into one device")
        return [layers]
    shared = placement[0] == placement[-1]
    # chains[k][a, j]: best bottleneck of stages 1 .. k that cover layers a .. j-1.
    start = np.full((layers + 1, layers + 1), np.inf)
    np.fill_diagonal(start, 0.0)
    chains = [start]
    for stage in range(1, stages - 1):
        single = alone(stage)
        chains.append(np.stack([np.maximum(before[:, None], single).min(axis=0) for before in chains[-1]]))
    # ends[a, b]: load of first and last stage when the middle covers layers a .. b-1.
    first, last = matrix(0, time)[0, :, None], matrix(stages - 1, time)[None, :, layers]
    ends = first + last if shared else np.maximum(first, last)
    kept_first, kept_last = matrix(0, memory)[0, :, None], matrix(stages - 1, memory)[None, :, layers]
    if shared:
        fits = kept_first + kept_last <= room[0]
    else:
        fits = (kept_first <= room[0]) & (kept_last <= room[-1])
    bottleneck = np.where(fits, np.maximum(ends, chains[-1]), np.inf)
    least = bottleneck.min()
    if not np.isfinite(least):
        raise NoSplitError("no contiguous split fits into the devices")
    candidates = np.argwhere(bottleneck == least)
    front, back = min(candidates.tolist(), key=lambda cut: (cut[1], cut[0]))
    cuts = [back]
    for stage in range(stages - 2, 0, -1):
        options = np.maximum(chains[stage - 1][front], alone(stage)[:, cuts[-1]])
        cuts.append(int(options.argmin()))
    bounds = [0, *reversed(cuts), layers]
    return [b - a for a, b in zip(bounds, bounds[1:], strict=False)]


def _counts_of_many(
    placement: Sequence[int], time: Load, memory: Load | None, limits: Sequence[float] | None
) -> list[int]:
    """`best_counts` where devices hold several stages."""
    shares = [placement.count(device) for device in placement]
    layers = [[value * n for value in row] for row, n in zip(time.layers, shares, strict=True)]
    alone = Load(layers, [value * n for value, n in zip(time.fixed, shares, strict=True)])
    counts = best_counts(range(len(placement)), alone)

    def of_stages(load: Load, counts: Sequence[int]) -> list[float]:
        bounds = [0, *itertools.accumulate(counts)]
        spans = zip(load.layers, bounds[:-1], bounds[1:], strict=True)
        return [fixed + sum(row[a:b]) for fixed, (row, a, b) in zip(load.fixed, spans, strict=True)]

    def of_devices(stages: Sequence[float]) -> list[float]:
        return [
            sum(x for x, d in zip(stages, placement, strict=True) if d == device) for device in sorted(set(placement))
        ]

    def badness(counts: Sequence[int]) -> tuple[float, float, float]:
        work, full = of_stages(time, counts), 0.0
        if memory is not None and limits is not None:
            sizes = of_devices(of_stages(memory, counts))
            full = sum(max(0.0, size - limits[device]) for device, size in enumerate(sizes))
        return full, max(of_devices(work)), max(work)

    last = len(placement) - 1
    while True:
        moved = [
            [count + (stage == to) - (stage == giver) for stage, count in enumerate(counts)]
            for giver in range(last + 1)
            for to in range(last + 1)
            if giver != to and counts[giver] > (giver != last)
        ]
        best = min(moved, key=badness, default=counts)
        if badness(best) >= badness(counts):
            break
        counts = best
    if badness(counts)[0]:
        raise NoSplitError("no contiguous split was found that fits into the devices")
    return counts
