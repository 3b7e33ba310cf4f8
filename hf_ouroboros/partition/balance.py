"""Layer counts per stage that keep the busiest device as little busy as possible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def balanced_counts(
    layer_costs: Sequence[float],
    placement: Sequence[int],
    head_cost: float = 0.0,
    embedding_cost: float = 0.0,
) -> list[int]:
    """Splits the layers into contiguous stages so that the busiest device's cost is minimal.

    Exact when every device holds one stage, or device 0 holds the first and the last one; where devices hold more
    stages than that, stages instead of devices are balanced.

    Args:
        layer_costs: relative cost of each layer.
        placement: device of each stage; its length is the number of stages.
        head_cost: cost of what follows the layers (in the last stage).
        embedding_cost: cost of what precedes them (in the first stage).

    Returns:
        Layers per stage. Every stage but the last has at least one, the last may be the head alone.
    """
    stages, layers = len(placement), len(layer_costs)
    if stages == 1:
        return [layers]
    if stages > layers + 1:
        raise ValueError(f"{stages} stages need at least {stages - 1} layers, not {layers}")
    prefix = [0.0, *accumulate(layer_costs)]
    shared = placement[0] == placement[-1]
    best: tuple[float, list[int]] | None = None
    for last in reversed(range(layers - stages + 2)):  # of equal splits, the one with the least delayed layers
        most = layers - last - (stages - 2)
        for first in range(most if stages == 2 else 1, most + 1):
            ends = prefix[first] + embedding_cost, prefix[layers] - prefix[layers - last] + head_cost
            bound = sum(ends) if shared else max(ends)
            bound = max(bound, (prefix[layers - last] - prefix[first]) / max(stages - 2, 1))
            if best is not None and bound >= best[0]:
                continue
            middle = _partition(prefix, first, layers - last, stages - 2)
            bound = max(bound, *(prefix[b] - prefix[a] for a, b in middle)) if middle else bound
            if best is None or bound < best[0]:
                best = bound, [first, *(b - a for a, b in middle), last]
    if best is None:
        raise ValueError("no split found")
    return best[1]


def _partition(prefix: Sequence[float], start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """Cuts [start, stop) into `parts` non-empty runs with the smallest largest sum (dynamic programming)."""
    if parts == 0:
        return []
    # table[n] = (bottleneck, cut points) of the best split of [start, start + n) into the parts so far
    table = {n: (prefix[start + n] - prefix[start], (start + n,)) for n in range(1, stop - start + 1)}
    for part in range(2, parts + 1):
        table = {
            n: min(
                (max(table[m][0], prefix[start + n] - prefix[start + m]), (*table[m][1], start + n))
                for m in range(part - 1, n)
            )
            for n in range(part, stop - start + 1)
        }
    cuts = (start, *table[stop - start][1])
    return list(zip(cuts, cuts[1:], strict=False))
