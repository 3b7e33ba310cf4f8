"""The balanced split is as good as the best of all splits."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ouroboros.partition.balance import Load, NoSplitError, best_counts
from hf_ouroboros.partition.device_map import default_placement


def balanced_counts(costs: list[float], placement: list[int], head: float = 0, embedding: float = 0) -> list[int]:
    """The best split for devices that are all alike."""
    fixed = [0.0] * len(placement)
    fixed[0] += embedding
    fixed[-1] += head
    return best_counts(placement, Load([costs] * len(placement), fixed))


def bottleneck(counts: list[int], costs: list[float], placement: list[int], head: float, embedding: float) -> float:
    """Cost of the busiest device."""
    loads, start = dict.fromkeys(placement, 0.0), 0
    for count, device in zip(counts, placement, strict=True):
        loads[device] += sum(costs[start : start + count])
        start += count
    loads[placement[0]] += embedding
    loads[placement[-1]] += head
    return max(loads.values())


def all_splits(layers: int, stages: int) -> list[list[int]]:
    """Every list of counts with at least one layer in all stages but the last."""
    if stages == 1:
        return [[layers]]
    # A stage's first layer is a cut; the last cut may be after the last layer.
    cuts = combinations(range(1, layers + 1), stages - 1)
    return [[b - a for a, b in zip((0, *c), (*c, layers), strict=True)] for c in cuts]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=4, max_size=9),
    st.integers(2, 3),
    st.integers(3, 7),
    st.booleans(),
    st.integers(0, 9),
)
def test_several_stages_per_device(costs: list[int], devices: int, stages: int, tied: bool, head: int) -> None:
    """Not always the best split, but never a layer away from it."""
    stages = min(stages, len(costs))
    placement = default_placement(stages, devices, tied)
    counts = balanced_counts(costs, placement, head)
    assert len(counts) == stages and sum(counts) == len(costs)
    assert all(count > 0 for count in counts[:-1])
    best = min(bottleneck(c, costs, placement, head, 0) for c in all_splits(len(costs), stages))
    assert best <= bottleneck(counts, costs, placement, head, 0) <= best + max(costs)


@pytest.mark.parametrize(
    ("layers", "devices", "counts"), [(8, 2, [2, 2, 2, 2]), (12, 3, [2] * 6), (9, 3, [1, 1, 1, 2, 2, 2])]
)
def test_there_and_back(layers: int, devices: int, counts: list[int]) -> None:
    assert balanced_counts([1.0] * layers, default_placement(2 * devices, devices, tied=False)) == counts


def test_several_stages_per_device_keep_to_the_limits_of_devices() -> None:
    """Of both stages of device 0 together."""
    time, memory = Load([[1.0] * 8] * 4, [0.0] * 4), Load([[10.0] * 8] * 4, [0.0] * 4)
    assert best_counts([0, 1, 1, 0], time, memory, [20.0, 60.0]) == [1, 3, 3, 1]
    with pytest.raises(NoSplitError, match="fits into the devices"):
        best_counts([0, 1, 1, 0], time, memory, [20.0, 50.0])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 20),
    st.integers(0, 5),
)
def test_no_split_is_better(costs: list[int], stages: int, tied: bool, head: int, embedding: int) -> None:
    stages = min(stages, len(costs) + 1)
    placement = default_placement(stages, max(1, stages - tied), tied)
    counts = balanced_counts(costs, placement, head, embedding)
    assert len(counts) == stages and sum(counts) == len(costs)
    assert all(count > 0 for count in counts[:-1])
    best = min(bottleneck(c, costs, placement, head, embedding) for c in all_splits(len(costs), stages))
    assert bottleneck(counts, costs, placement, head, embedding) == best


@pytest.mark.parametrize(
    ("layers", "placement", "head", "counts"),
    [
        (12, [0], 0, [12]),
        (12, [0, 1, 0], 0, [1, 6, 5]),  # of equal splits, the one with the most layers in the least delayed stage
        (12, [0, 1, 2], 0, [4, 4, 4]),
        (12, [0, 1, 2], 4, [4, 6, 2]),
        (3, [0, 1, 2, 0], 0, [1, 1, 1, 0]),
    ],
)
def test_examples(layers: int, placement: list[int], head: float, counts: list[int]) -> None:
    assert balanced_counts([1.0] * layers, placement, head) == counts


def test_more_stages_than_layers() -> None:
    with pytest.raises(ValueError, match="5 stages need at least 4 layers, not 3"):
        balanced_counts([1.0] * 3, [0, 1, 2, 3, 0])


def total(load: Load, counts: list[int], placement: list[int]) -> dict[int, float]:
    """Load of every device, added up by hand."""
    loads, start = dict.fromkeys(placement, 0.0), 0
    for stage, (count, device) in enumerate(zip(counts, placement, strict=True)):
        loads[device] += sum(load.layers[stage][start : start + count]) + load.fixed[stage]
        start += count
    return loads


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.booleans(), st.data())
def test_unlike_devices_with_limits(layers: int, stages: int, tied: bool, data: st.DataObject) -> None:
    """Other times on every device, other bytes in every stage: as good as the best of all splits that fit."""
    stages = min(stages, layers + 1)
    placement = default_placement(stages, max(1, stages - tied), tied)

    def load(most: int) -> Load:
        row = st.lists(st.integers(0, most), min_size=layers, max_size=layers)
        fixed = data.draw(st.lists(st.integers(0, most), min_size=stages, max_size=stages))
        return Load([data.draw(row) for _ in range(stages)], fixed)

    time, memory = load(9), load(4)
    limits = data.draw(st.lists(st.integers(0, 20), min_size=max(placement) + 1, max_size=max(placement) + 1))
    fitting = [
        max(total(time, counts, placement).values())
        for counts in all_splits(layers, stages)
        if all(size <= limits[d] for d, size in total(memory, counts, placement).items())
    ]
    if not fitting:
        with pytest.raises(NoSplitError):
            best_counts(placement, time, memory, limits)
        return
    counts = best_counts(placement, time, memory, limits)
    assert all(size <= limits[d] for d, size in total(memory, counts, placement).items())
    assert max(total(time, counts, placement).values()) == min(fitting)


def test_a_slow_device_gets_less() -> None:
    time = Load([[1.0] * 12, [2.0] * 12, [1.0] * 12, [1.0] * 12], [0.0] * 4)
    assert best_counts([0, 1, 2, 3], time) == [2, 2, 4, 4]  # 4 at most; device 1 takes 2 for each
