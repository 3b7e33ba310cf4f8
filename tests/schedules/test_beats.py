"""Devices with any stages: programs that never wait for ever, whatever updates come, and that hardly wait at all."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_programs import UPDATES, Updates, expected_order, make_slots, of_stage
from trainer_helpers import EVERY

from hf_ouroboros.schedules import device_programs
from hf_ouroboros.schedules.beats import found_beats
from hf_ouroboros.schedules.instructions import Forward
from hf_ouroboros.schedules.programs import beat_program
from hf_ouroboros.schedules.replay import replay
from hf_ouroboros.simulate.simulator import StageCost, ideal_speedup, simulate


@st.composite
def placements(draw: st.DrawFn) -> list[int]:
    """K <= 8 stages on D <= 4 devices, tied (the last with the first) or not."""
    raw = draw(st.lists(st.integers(0, 3), min_size=2, max_size=8))
    if draw(st.booleans()):
        raw[-1] = raw[0]
    order = list(dict.fromkeys(raw))
    return [order.index(device) for device in raw]


@settings(max_examples=2000 if EVERY else 60)
@given(
    placements(),
    st.sampled_from(["pipelined", "1f1b", "lockstep"]),
    UPDATES,
    st.integers(0, 3),
    st.frozensets(st.integers(0, 20), max_size=3),
    st.data(),
)
def test_every_run_is_in_order_and_ends(
    placement: list[int], schedule: str, updates: Updates, warmup: int, pauses: frozenset[int], data: st.DataObject
) -> None:
    """Also with durations, updates and looks that nobody had in mind when the order was chosen. (zero_bubble is in test_filling.py.)"""
    stages = len(placement)
    costs = data.draw(st.lists(st.integers(1, 9), min_size=stages, max_size=stages))
    warmup = len(updates) if schedule == "1f1b" else warmup
    programs = device_programs(schedule, placement, costs, [2 * c for c in costs], data.draw(st.integers(1, 4)))
    slots = make_slots(stages, updates, warmup, pauses, settle=data.draw(st.booleans()))
    executed = replay([program(slots) for program in programs], lambda i: 1.0, stages)
    for stage in range(stages):
        assert of_stage(executed, stage) == expected_order(stage, stages, updates, warmup)


@settings(max_examples=500 if EVERY else 30)
@given(placements(), st.data())
def test_a_beat_has_every_half_once(placement: list[int], data: st.DataObject) -> None:
    stages = len(placement)
    costs = data.draw(st.lists(st.integers(1, 9), min_size=stages, max_size=stages))
    for beats in found_beats(placement, costs, [2 * c for c in costs]):
        for device, beat in enumerate(beats):
            own = [k for k, d in enumerate(placement) if d == device]
            assert sorted(stage for stage, _ in beat) == sorted(2 * own)
            assert beat[0] == (own[0], 1), "its first stage is never behind"
            for stage in own:
                first, second = (behind for k, behind in beat if k == stage)
                assert first - second == 1 and 0 <= second <= 2 * stages


def test_a_beat_by_hand() -> None:
    """The second stage is a slot behind; a pause catches up."""
    program = beat_program([(0, 1), (2, 3), (2, 2), (0, 0)], 3)
    done = [i for i in program(make_slots(3, [1] * 4)) if isinstance(i, Forward)]
    assert [(i.stage, i.tick) for i in done] == [(0, 0), (0, 1), (2, 0), (0, 2), (2, 1), (0, 3), (2, 2), (2, 3)]


@pytest.mark.parametrize(
    ("placement", "costs"),
    [
        ([0, 1, 2, 3] * 3, [1.0] * 12),
        ([*range(8)] * 2, [1.0] * 16),
        ([0, 1, 2, 3] * 3 + [0], [0.5, *[1.0] * 11, 0.5]),
        ([0, 1, 2, 3, 3, 2, 1, 0], [1.0] * 8),
        ([0, 1, 0, 2, 1, 2], [4.94, 4.41, 3.03, 0.94, 3.46, 7.11]),
        ([0, 1, 2, 1, 3, 2, 0], [4.25, 1.78, 1.22, 2.72, 4.37, 3.27, 0.0]),
        ([0, 1, 2, 1, 0, 2, 3, 1], [1.88, 0.87, 0.65, 1.42, 1.71, 3.18, 3.81, 1.59]),
    ],
    ids=str,
)
def test_nobody_waits(placement: list[int], costs: list[float]) -> None:
    """Where the busiest device could be busy all the time, it is; offsets alone reached 0.5 to 0.97 of that."""
    stages = [StageCost(max(c, 1e-3), 2 * max(c, 1e-3)) for c in costs]
    assert simulate("pipelined", placement, stages, 2).speedup >= 0.99 * ideal_speedup(placement, stages, 2)


def test_balanced_devices_are_busy_on_the_whole() -> None:
    """Random placements, neighbours apart, all devices with as much to do."""
    generator, reached = random.Random(5), []
    while len(reached) < 12:
        placement = [generator.randrange(4) for _ in range(generator.randrange(5, 9))]
        if len(set(placement)) < 4 or any(a == b for a, b in pairwise(placement)):
            continue
        costs = [generator.uniform(0.3, 2) for _ in placement]
        loads = [sum(c for c, d in zip(costs, placement, strict=True) if d == device) for device in range(4)]
        stages = [StageCost(c / loads[d], 2 * c / loads[d]) for c, d in zip(costs, placement, strict=True)]
        reached.append(simulate("pipelined", placement, stages, 2).speedup / 4)
    assert min(reached) > 0.8 and sum(reached) / len(reached) > 0.97
