"""Stages anywhere: close to the best balance there is, with stages that are worth their delay, and the same in every run."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_ouroboros.planning
from hf_ouroboros.partition.balance import Load, NoSplitError
from hf_ouroboros.partition.device_map import default_num_stages, default_placement
from hf_ouroboros.partition.mixed import NEAR, mixed_splits, worth_it
from hf_ouroboros.partition.mixed_choice import Row, choose_mixed, least_full
from hf_ouroboros.partition.sweeps import MixedSplit
from hf_ouroboros.partition.unordered import unordered

FREE = [float("inf")] * 8


def chosen(
    costs: list[float],
    devices: int,
    tied: bool,
    ends: tuple[float, float] = (0.0, 0.0),
    sizes: list[float] | None = None,
    limits: list[float] | None = None,
    num_stages: int | None = None,
) -> tuple[MixedSplit, str]:
    """What "mixed" makes of a row of layers."""
    row = Row(costs, sizes or [0.0] * len(costs), ends, (0.0, 0.0), tied)
    fewest = min(default_num_stages(devices, tied), len(costs) + 1)
    placement = default_placement(fewest, devices, tied)
    return choose_mixed(row, placement, devices, (limits or FREE)[:devices], num_stages)


def check(split: MixedSplit, costs: list[float], devices: int, tied: bool, ends: tuple[float, float]) -> None:
    """A split of all layers, whose devices have the work that it says."""
    assert sum(split.counts) == len(costs) and len(split.counts) == len(split.placement)
    assert all(split.counts[1:-1]) and all(a != b for a, b in itertools.pairwise(split.placement))
    assert set(split.placement) >= set(range(min(devices, len(costs) + 1)))
    assert list(dict.fromkeys(split.placement)) == sorted(set(split.placement)), "in the order of the row"
    assert split.placement[0] == 0 and (split.placement[-1] == 0 or not tied)
    loads, layer = [0.0] * devices, 0
    for device, count in zip(split.placement, split.counts, strict=True):
        loads[device] += sum(costs[layer : layer + count])
        layer += count
    loads[0] += ends[0]
    loads[split.placement[-1]] += ends[1]
    assert list(split.loads) == pytest.approx(loads)


def best_balance(costs: list[float], devices: int, tied: bool, ends: tuple[float, float]) -> float:
    """By trying everything, but for what is the same with other names of devices."""
    best = float("inf")

    def give(layer: int, loads: tuple[float, ...]) -> None:
        nonlocal best
        if max(loads) >= best:
            return
        if layer == len(costs):
            best = max(loads)
            return
        for load in dict.fromkeys(loads):
            device = loads.index(load)
            give(layer + 1, (*loads[:device], load + costs[layer], *loads[device + 1 :]))

    for last in {0} if tied else {0, min(1, devices - 1)}:
        loads = [ends[0], *[0.0] * (devices - 1)]
        loads[last] += ends[1]
        give(0, tuple(loads))
    return best


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [0.0, 1.8, 4.2])
def test_twelve_layers_and_a_heavy_head_on_five_devices(head: float, tied: bool) -> None:
    generator = random.Random(int(10 * head))
    rows = [[1.0] * 12, [1.0, 3.0] * 6, [1.0] * 6 + [2.2] * 6, [round(generator.uniform(0.5, 2), 2) for _ in range(12)]]
    for costs in rows:
        ends = 0.0, head * sum(costs) / 12
        split, _ = chosen(costs, 5, tied, ends)
        check(split, costs, 5, tied, ends)
        assert split.heaviest <= best_balance(costs, 5, tied, ends) * (1 + NEAR) * (1 + 1e-9)


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 20),
    st.integers(0, 3),
)
def test_close_to_the_best_balance(costs: list[int], devices: int, tied: bool, head: int, embedding: int) -> None:
    ends = float(embedding), float(head)
    split, reason = chosen([float(c) for c in costs], devices, tied, ends)
    check(split, costs, devices, tied, ends)
    assert split.heaviest <= best_balance(costs, devices, tied, ends) * (1 + NEAR) * (1 + 1e-9)
    assert chosen([float(c) for c in costs], devices, tied, ends) == (split, reason)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=7), st.integers(2, 4), st.booleans(), st.data())
def test_memory_is_kept_to(costs: list[int], devices: int, tied: bool, data: st.DataObject) -> None:
    numbers = st.lists(st.integers(1, 9), min_size=len(costs), max_size=len(costs))
    sizes, limits = data.draw(numbers), data.draw(st.lists(st.integers(1, 25), min_size=devices, max_size=devices))
    row = Row(costs, sizes, (0.0, 1.0), (2.0, 0.0 if tied else 2.0), tied)
    try:
        split, _ = chosen(costs, devices, tied, (0.0, 1.0), sizes, limits)
    except NoSplitError:
        assert any(need > limits[d] for d, need in least_full(row, devices, limits, None).items())
        return
    used, layer = [0.0] * devices, 0
    for device, count in zip(split.placement, split.counts, strict=True):
        used[device] += sum(sizes[layer : layer + count])
        layer += count
    assert all(size <= limit for size, limit in zip(used, limits, strict=True))


def test_what_no_contiguous_split_can_do() -> None:
    """Two sorts of layers, each with its own memory: they fit only if both devices have some of each."""
    costs, sizes = [1.0] * 6, [9.0, 9.0, 9.0, 1.0, 1.0, 1.0]
    split, _ = chosen(costs, 2, tied=False, sizes=sizes, limits=[19.0, 19.0])
    assert len(split.placement) > 2
    assert split.heaviest == 4.0 or split.heaviest == 3.0


def test_a_further_stage_has_to_save_its_share() -> None:
    def of(loads: dict[int, float]) -> int:
        splits = {k: MixedSplit((0,) * k, (1,) * k, (load,)) for k, load in loads.items()}
        return len(worth_it(splits).placement)

    assert of({4: 100.0, 5: 99.5, 6: 99.2}) == 4
    assert of({4: 100.0, 5: 98.9, 6: 98.5}) == 5
    assert of({4: 100.0, 5: 100.0, 6: 97.9}) == 6
    assert of({4: 104.0, 12: 100.0}) == 12, "never more than 3 % behind the best balance"
    assert of({4: 102.9, 12: 100.0}) == 4


def test_unlike_devices() -> None:
    """The second device is three times as fast."""
    slow, fast = (Load([[t] * 8] * 4, [0.0] * 4) for t in (3.0, 1.0))
    found = mixed_splits([slow, fast], [2, 3, 4], tied=False)
    assert found[2].counts == (2, 6) and found[2].loads == (6.0, 6.0)


def test_long_rows_take_no_long_search() -> None:
    generator = random.Random(3)
    costs = [generator.uniform(1, 2) for _ in range(200)]
    split, reason = chosen(costs, 8, True, (0.0, 9.0))
    check(split, costs, 8, True, (0.0, 9.0))
    assert split.heaviest <= sum(costs, 9.0) / 8 * 1.02


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 3), st.integers(0, 9))
def test_in_any_order(costs: list[int], devices: int, begun: int) -> None:
    loads = [float(begun), *[0.0] * (devices - 1)]
    for layer, device in enumerate(unordered([costs] * devices, loads)):
        loads[device] += costs[layer]
    assert max(loads) == best_balance(costs, devices, True, (float(begun), 0.0))


def test_in_any_order_of_many() -> None:
    assert sorted(unordered([[1.0] * 100] * 4, [0.0] * 4)) == [d for d in range(4) for _ in range(25)]


def test_the_picture() -> None:
    """That of the module's docstring."""
    split, _ = chosen([4.0, 1.0, 1.0, 4.0, 1.0, 1.0], 3, True)
    assert (split.placement, split.counts, split.loads) == ((0, 1, 2, 1, 0), (1, 2, 1, 2, 0), (4.0, 4.0, 4.0))
    split, _ = chosen([4.0, 1.0, 1.0, 4.0, 1.0, 1.0], 3, True, num_stages=4)
    assert sorted(split.loads) == [2.0, 5.0, 5.0]


def test_the_examples_of_the_document() -> None:
    """GPT-2, and layers of which every other one is a mixture."""
    text = (Path(hf_ouroboros.planning.__file__).parent / "README.md").read_text(encoding="utf-8")
    split, reason = chosen([12 * 768 * 768.0] * 12, 5, True, (0.0, 50257 * 768.0))
    assert split.counts == (0, 3, 3, 3, 3, 0) and reason.partition("; one stage more")[0] in text
    contiguous = 12 * 768 * 768 + 50257 * 768
    assert contiguous / split.heaviest == pytest.approx(1.18, abs=0.005) and "18 % more work" in text
    split, reason = chosen([1.0, 3.0] * 8, 5, False, (0.0, 2.0))
    assert len(split.counts) == 7 and "1.029 times the mean work in 7 stages (1.176 in 5," in reason
    assert "1.176 in 5 stages, 1.029 in 7" in text
