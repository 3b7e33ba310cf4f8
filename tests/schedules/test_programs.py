"""The schedules as pure sequences: order per stage, delays, drains, and the throughput they promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ouroboros.partition.device_map import default_placement
from hf_ouroboros.schedules import device_programs
from hf_ouroboros.schedules.clock import Clock, Pause, Slot
from hf_ouroboros.schedules.instructions import (
    Backward,
    Exchange,
    Forward,
    Instruction,
    Rendezvous,
    Report,
    Settle,
    Step,
)
from hf_ouroboros.schedules.interleave import sample_slots
from hf_ouroboros.schedules.programs import dataflow_program, lockstep_program, stages_by_device
from hf_ouroboros.schedules.replay import Executed, replay

Updates = list[int]  # ticks of each update
UPDATES = st.lists(st.integers(1, 5), min_size=1, max_size=8)


def make_slots(
    num_stages: int, updates: Updates, warmup: int = 0, pauses: frozenset[int] = frozenset(), settle: bool = False
) -> list[Slot | Pause]:
    """The slots of a run, with a pause after every tick in `pauses`."""
    clock = Clock(num_stages, lambda update: update < warmup)
    slots: list[Slot | Pause] = []
    for ticks in updates:
        for _ in range(ticks):
            tick, released = clock.next_tick()
            slots += released
            if tick in pauses:
                slots += [*clock.interrupt(), Pause(settle)]
        slots += clock.close_update()[1]
    assert clock.tick == sum(updates) and clock.update == len(updates)
    return [*slots, Pause()]


def expected_order(stage: int, num_stages: int, updates: Updates, warmup: int) -> list[Instruction]:
    """The update rule for one stage, read aloud.

    Delayed: F(t), B(t-d) if t-d is a delayed tick, Step after the update's last tick.
    Drained: the same offset within the update, then the rest of its backwards, Step.
    """
    delay, order, tick = num_stages - 1 - stage, [], 0
    start = sum(updates[:warmup])
    for update, ticks in enumerate(updates):
        own = range(tick, tick + ticks)
        oldest = own.start if update < warmup else start
        for t in own:
            order.append(Forward(stage, t))
            if t - delay >= oldest:
                order.append(Backward(stage, t - delay))
        if update < warmup:
            order += [Backward(stage, t) for t in own if t > own[-1] - delay]
        order.append(Step(stage, update))
        tick += ticks
    return order


def work(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Without what only coordinates."""
    return [i for i in instructions if isinstance(i, (Forward, Backward, Step))]


def of_stage(executed: Sequence[Executed], stage: int) -> list[Instruction]:
    """What a stage did, in its order."""
    mine = work([item.instruction for item in executed])
    return [i for i in mine if i.stage == stage]


# ---- order ----


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), UPDATES, st.integers(0, 9), st.frozensets(st.integers(0, 30)), st.data())
def test_order_of_a_stage(
    num_stages: int, updates: Updates, warmup: int, pauses: frozenset[int], data: st.DataObject
) -> None:
    stage = data.draw(st.integers(0, num_stages - 1))
    offset = data.draw(st.integers(0, 2 * num_stages))
    slots = make_slots(num_stages, updates, warmup, pauses)
    expected = expected_order(stage, num_stages, updates, warmup)
    assert work(list(dataflow_program([stage], [offset], num_stages)(slots))) == expected
    assert work(list(dataflow_program([stage], [offset], num_stages, exchange=True)(slots))) == expected
    assert work(list(lockstep_program([stage], num_stages)(slots))) == expected


def test_docstring_picture() -> None:
    def text(instruction: Instruction) -> str:
        return f"{type(instruction).__name__[0]}{instruction.tick if not isinstance(instruction, Step) else ''}"

    slots = make_slots(3, [1] * 5)
    rows = [" ".join(map(text, work(list(dataflow_program([k], [0], 3)(slots))))) for k in range(3)]
    assert rows[0] == "F0 S F1 S F2 B0 S F3 B1 S F4 B2 S"
    assert rows[1] == "F0 S F1 B0 S F2 B1 S F3 B2 S F4 B3 S"
    assert rows[2] == "F0 B0 S F1 B1 S F2 B2 S F3 B3 S F4 B4 S"


def test_one_forward_one_backward() -> None:
    slots = make_slots(3, [4], warmup=1)
    order = [f"{type(i).__name__[0]}{i.tick}" for i in work(list(dataflow_program([0], [0], 3)(slots)))[:-1]]
    assert order == "F0 F1 F2 B0 F3 B1 B2 B3".split()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), UPDATES)
def test_synchronous_updates_are_drained(num_stages: int, updates: Updates) -> None:
    """Delay 0: between two steps lie exactly the update's own forwards and backwards."""
    slots = make_slots(num_stages, updates, warmup=len(updates))
    for stage in range(num_stages):
        first, forwards, backwards, closed = 0, [], [], 0
        for instruction in dataflow_program([stage], [0], num_stages)(slots):
            if isinstance(instruction, Forward):
                forwards.append(instruction.tick)
            elif isinstance(instruction, Backward):
                assert instruction.tick in forwards
                backwards.append(instruction.tick)
            elif isinstance(instruction, Step):
                own = list(range(first, first + updates[closed]))
                assert forwards == backwards == own
                first, forwards, backwards, closed = first + updates[closed], [], [], closed + 1
        assert closed == len(updates)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), UPDATES, st.integers(0, 4), st.booleans())
def test_lockstep_slots(num_stages: int, updates: Updates, warmup: int, exchange: bool) -> None:
    """Per slot: forwards upwards, rendezvous, backwards downwards, [exchange], steps, rendezvous."""
    stages = list(range(num_stages))
    slots = make_slots(num_stages, updates, warmup)
    program = list(lockstep_program(stages, num_stages, exchange)(slots))
    assert program[-1] == Report()
    halves: list[list[Instruction]] = [[]]
    for instruction in program[:-1]:
        halves[-1].append(instruction)
        if isinstance(instruction, Rendezvous):
            halves.append([])
    assert halves.pop() == [] and len(halves) == 2 * (len(slots) - 1)
    for slot, up, down in zip(slots, halves[::2], halves[1::2], strict=False):
        assert up == [*(Forward(k, slot.tick) for k in stages if slot.tick is not None), Rendezvous()]
        kinds = [type(i) for i in down]
        assert kinds == sorted(kinds, key=[Backward, Exchange, Step, Rendezvous].index)
        assert [i.stage for i in down if isinstance(i, Backward)] == sorted(
            (k for k in stages if slot.recent_ticks[num_stages - 1 - k] is not None), reverse=True
        )
        assert kinds.count(Step) == (num_stages if slot.update is not None else 0)
        assert kinds.count(Exchange) == int(exchange and slot.update is not None)


@pytest.mark.parametrize("settle", [False, True])
def test_pause_catches_up_before_it_reports(settle: bool) -> None:
    slots = make_slots(3, [2, 2], pauses=frozenset({1}), settle=settle)
    program = list(dataflow_program([0, 2], [1, 4], 3)(slots))
    head = program[: program.index(Report())]
    assert [i for i in head if isinstance(i, Forward) and i.stage == 2] == [Forward(2, 0), Forward(2, 1)]
    assert [i for i in head if isinstance(i, Settle)] == ([Settle(2), Settle(0)] if settle else [])
    assert program[-1] == Report()


def test_stages_by_device() -> None:
    assert stages_by_device([0, 1, 2, 0]) == [[0, 3], [1], [2]]
    assert stages_by_device([0]) == [[0]]


# ---- clock ----


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), UPDATES, UPDATES, st.integers(0, 9))
def test_clock_resumes(num_stages: int, before: Updates, after: Updates, warmup: int) -> None:
    """A new clock continues with the very slots that the old one would have gone on with."""
    clock = Clock(num_stages, lambda update: update < warmup)
    for ticks in before:
        for _ in range(ticks):
            clock.next_tick()
        clock.close_update()
    other = Clock(num_stages, lambda update: update < warmup)
    other.resume(clock.tick, clock.update, clock.delay_start)
    for ticks in after:
        for _ in range(ticks):
            assert other.next_tick() == clock.next_tick()
        assert other.close_update() == clock.close_update()
    assert (other.tick, other.update, other.delay_start) == (clock.tick, clock.update, clock.delay_start)


def test_clock_interrupt_releases_the_held_slot_once() -> None:
    clock = Clock(2, lambda update: False)
    assert clock.interrupt() == []
    assert clock.next_tick() == (0, [])
    assert clock.interrupt() == [Slot((0, None))]
    assert clock.interrupt() == []
    assert clock.close_update() == (0, [Slot((None, None), 0)])  # a slot without a tick closes the update
    assert clock.next_tick() == (1, [])
    assert clock.close_update() == (1, [Slot((1, 0), 1)])


def test_delay_start() -> None:
    clock = Clock(3, lambda update: update < 2)
    for update, expected in [(0, None), (1, None), (2, 4), (3, 4)]:
        clock.next_tick()
        clock.next_tick()
        assert clock.delay_start == expected
        assert clock.close_update()[0] == update


# ---- all devices together ----


@st.composite
def placements(draw: st.DrawFn) -> list[int]:
    """Defaults, and any interleaving: with K <= 7 stages on up to K devices, all of them used."""
    num_stages = draw(st.integers(1, 7))
    if draw(st.booleans()):
        return default_placement(num_stages, draw(st.integers(1, num_stages)), draw(st.booleans()))
    raw = draw(st.lists(st.integers(0, 3), min_size=num_stages, max_size=num_stages))
    order = list(dict.fromkeys(raw))
    return [order.index(device) for device in raw]


@settings(max_examples=120, deadline=None)
@given(
    placements(),
    st.sampled_from(["pipelined", "lockstep", "1f1b"]),  # zero_bubble is in test_filling.py
    st.booleans(),
    UPDATES,
    st.integers(0, 4),
    st.frozensets(st.integers(0, 20), max_size=4),
    st.data(),
)
def test_nobody_waits_for_ever(
    placement: list[int],
    schedule: str,
    exchange: bool,
    updates: Updates,
    warmup: int,
    pauses: frozenset[int],
    data: st.DataObject,
) -> None:
    """Whatever was simulated when the order was chosen: it has to hold for every run, and keep each stage's order."""
    num_stages = len(placement)
    exchange &= schedule != "pipelined"  # a global norm and pipelined exclude each other
    costs = data.draw(st.lists(st.integers(1, 9), min_size=num_stages, max_size=num_stages))
    programs = device_programs(schedule, placement, costs, [2 * c for c in costs], updates[0], exchange)
    warmup = len(updates) if schedule == "1f1b" else warmup
    slots = make_slots(num_stages, updates, warmup, pauses)
    executed = replay([program(slots) for program in programs], lambda i: 1.0, num_stages)
    for stage in range(num_stages):
        assert of_stage(executed, stage) == expected_order(stage, num_stages, updates, warmup)


@pytest.mark.parametrize("num_stages", range(2, 12))
def test_stage_0_keeps_at_most_k_micro_batches(num_stages: int) -> None:
    programs = device_programs(
        "pipelined", default_placement(num_stages, num_stages - 1, True), [1] * num_stages, [2] * num_stages
    )
    pending: set[int] = set()
    for instruction in programs[0](make_slots(num_stages, [1] * 40)):
        if isinstance(instruction, Forward) and instruction.stage == 0:
            pending.add(instruction.tick)
            assert len(pending) <= num_stages
        elif isinstance(instruction, Backward) and instruction.stage == 0:
            pending.remove(instruction.tick)


# ---- throughput ----


def speedup(schedule: str, placement: list[int], costs: list[float], ticks: int, updates: int) -> float:
    """Times faster than one device that does it all, in the steady state of the simulated run."""
    num_stages = len(placement)

    def duration(instruction: Instruction) -> float:
        match instruction:
            case Forward(stage, _):
                return costs[stage]
            case Backward(stage, _):
                return 2 * costs[stage]
        return 0.0

    programs = device_programs(schedule, placement, costs, [2 * c for c in costs], ticks)
    slots = make_slots(num_stages, [ticks] * updates, updates if schedule == "1f1b" else 0)
    executed = replay([program(slots) for program in programs], duration, num_stages)
    # Period: from one update's first-stage step to another's, far from the beginning and the end of the run.
    ends = {
        i.instruction.update: i.end for i in executed if isinstance(i.instruction, Step) and i.instruction.stage == 0
    }
    first, last = updates // 2, updates - 2
    return 3 * sum(costs) * ticks * (last - first) / (ends[last] - ends[first])


def snake(devices: int) -> tuple[list[int], list[float]]:
    """Tied stages on balanced devices: first and last stage have half a device's work each."""
    stages = devices + 1
    return default_placement(stages, devices, tied=True), [0.5, *[1.0] * (stages - 2), 0.5]


@pytest.mark.parametrize("ticks", [1, 2, 5])
@pytest.mark.parametrize("devices", [2, 3, 4, 5, 6, 7, 8])
def test_pipelined_is_linear(devices: int, ticks: int) -> None:
    assert 0.95 * devices <= speedup("pipelined", *snake(devices), ticks, 60 // ticks) <= devices + 1e-9


@pytest.mark.parametrize("stages", [2, 3, 5, 8])
def test_pipelined_is_linear_with_one_stage_per_device(stages: int) -> None:
    found = speedup("pipelined", list(range(stages)), [1.0] * stages, 1, 60)
    assert found == pytest.approx(stages)  # sums of floats


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_lockstep_saturates(devices: int) -> None:
    found = speedup("lockstep", *snake(devices), 1, 40)
    assert found == pytest.approx(3 / (1 + 2 / devices))  # sums of floats


@pytest.mark.parametrize("ticks", [1, 2, 4, 8])
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_1f1b_has_its_bubble(stages: int, ticks: int) -> None:
    found = speedup("1f1b", list(range(stages)), [1.0] * stages, ticks, 8)
    assert found == pytest.approx(ticks * stages / (ticks + stages - 1))  # sums of floats


@pytest.mark.parametrize("head", [0.1, 0.3, 0.7, 0.9])
def test_uneven_ends_of_a_balanced_snake(head: float) -> None:
    placement = default_placement(5, 4, tied=True)
    assert speedup("pipelined", placement, [1 - head, 1.0, 1.0, 1.0, head], 1, 60) >= 0.95 * 4


def test_sample_is_long_enough() -> None:
    counted: Callable[[list[Slot | Pause]], int] = lambda slots: sum(  # noqa: E731
        isinstance(s, Slot) and s.tick is not None for s in slots
    )
    assert counted(sample_slots(4, 1, synchronous=False)) == 16
    assert counted(sample_slots(4, 8, synchronous=True)) == 16
    assert counted(sample_slots(4, 5, synchronous=True)) == 20
