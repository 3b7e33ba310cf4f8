"""zero_bubble's programs: complete, synchronous, free of deadlocks for whatever updates come, and without bubbles."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ouroboros.schedules import SCHEDULES, device_programs, filling
from hf_ouroboros.schedules.clock import Clock, Pause, Slot
from hf_ouroboros.schedules.filling import filling_programs, most_kept
from hf_ouroboros.schedules.instructions import (
    Backward,
    Exchange,
    Forward,
    InputGradient,
    Instruction,
    Report,
    Settle,
    Step,
    WeightGradient,
)
from hf_ouroboros.schedules.replay import replay
from hf_ouroboros.simulate.simulator import StageCost, simulate


def slots_of(num_stages: int, updates: list[int], pauses: frozenset[int], settle: bool) -> list[Slot | Pause]:
    """The slots of a run, with a pause after every tick in `pauses`, some with all that is pending."""
    clock, slots = Clock(num_stages, lambda update: True), []
    for ticks in updates:
        for _ in range(ticks):
            tick, released = clock.next_tick()
            slots += released
            if tick in pauses:
                slots += [*(clock.drain() if settle else clock.interrupt()), Pause(settle)]
        slots += clock.close_update()[1]
    return [*slots, Pause()]


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=7),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(1, 6),
    st.booleans(),
    st.frozensets(st.integers(0, 20), max_size=3),
    st.booleans(),
    st.data(),
)
def test_any_placement_and_any_updates(
    raw: list[int],
    updates: list[int],
    expected: int,
    exchange: bool,
    pauses: frozenset[int],
    settle: bool,
    data: st.DataObject,
) -> None:
    """Also updates of other lengths than the order was made for, and looks in the middle of them."""
    order = list(dict.fromkeys(raw))
    placement, num_stages = [order.index(device) for device in raw], len(raw)
    costs = data.draw(st.lists(st.integers(1, 9), min_size=num_stages, max_size=num_stages))
    programs = filling_programs(placement, costs, [2 * c for c in costs], expected, exchange)
    slots = slots_of(num_stages, updates, pauses, settle)
    done = [e.instruction for e in replay([program(slots) for program in programs], lambda i: 1.0, num_stages)]
    ticks, devices = range(sum(updates)), max(placement) + 1
    backward = {k: Backward if k == 0 else InputGradient for k in range(num_stages)}
    wanted = [kind(k, t) for k in backward for t in ticks for kind in (Forward, backward[k])]
    wanted += [WeightGradient(k, t) for k in range(1, num_stages) for t in ticks]
    wanted += [Step(k, u) for k in backward for u in range(len(updates))]
    wanted += [Exchange(u) for u in range(len(updates)) for _ in range(devices if exchange else 0)]
    assert Counter(i for i in done if not isinstance(i, (Report, Settle))) == Counter(wanted)
    for stage in backward:
        own = [i for i in done if getattr(i, "stage", None) == stage and not isinstance(i, Settle)]
        check_order(own, stage, num_stages, updates, max(expected, 1))


def check_order(own: list[Instruction], stage: int, num_stages: int, updates: list[int], expected: int) -> None:
    """Every part in tick order, after the one before; all of an update before its step; few micro-batches kept."""
    closed, first, kept = 0, 0, set()
    seen: dict[type, list[int]] = {}
    for i in own:
        if isinstance(i, Step):
            assert i.update == closed and not kept
            first, closed = first + updates[closed], closed + 1
            assert all(ticks == list(range(first)) for ticks in seen.values())
            continue
        ticks = seen.setdefault(type(i), [])
        assert i.tick == len(ticks) and i.tick < first + updates[closed]
        ticks.append(i.tick)
        if isinstance(i, Forward):
            kept.add(i.tick)
            assert len(kept) <= most_kept(stage, num_stages, expected)
        elif isinstance(i, WeightGradient) or type(i) is Backward:
            kept.remove(i.tick)


def test_the_head_of_a_tied_matrix_comes_before_the_embedding() -> None:
    """Whose gradient the head's side is added to."""
    done = list(filling_programs([0, 1, 0], [1] * 3, [2] * 3, 4, False)[0](slots_of(3, [4, 4], frozenset(), False)))
    for tick in range(8):
        assert done.index(WeightGradient(2, tick)) < done.index(Backward(0, tick))


def test_picture() -> None:
    """That of the module's docstring."""
    lengths = {Forward: 1.0, Backward: 2.0, InputGradient: 1.0, WeightGradient: 1.0}
    programs = filling_programs([0, 1, 2], [1.0] * 3, [2.0] * 3, 5, False)
    slots = slots_of(3, [5, 5], frozenset(), False)
    rows = [["  "] * 40 for _ in programs]
    for e in replay([program(slots) for program in programs], lambda i: lengths.get(type(i), 0.0), 3):
        if e.end > e.start:
            letter = {Forward: "F", WeightGradient: "W"}.get(type(e.instruction), "B")
            rows[e.device][int(e.start) : int(e.end)] = [f"{letter}{e.instruction.tick}", "--"][: int(e.end - e.start)]
    for stage, row in enumerate(rows):
        assert f"    stage {stage}   {' '.join(row[:18])} ...\n" in filling.__doc__


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (3, 8), (4, 8), (8, 16)])
def test_no_bubble_is_left(stages: int, micro_batches: int) -> None:
    """With balanced stages and twice as many micro-batches as stages; 1f1b has one of K-1 periods."""
    costs = [StageCost(1.0, 2.0)] * stages
    found = simulate("zero_bubble", range(stages), costs, micro_batches)
    assert found.speedup >= 0.97 * stages
    assert simulate("1f1b", range(stages), costs, micro_batches).speedup < 0.9 * stages
    assert max(found.ticks_in_flight) <= most_kept(0, stages, micro_batches)


@pytest.mark.parametrize(("devices", "micro_batches"), [(2, 2), (2, 4), (3, 4), (4, 4), (8, 8)])
def test_never_behind_those_it_descends_from(devices: int, micro_batches: int) -> None:
    costs = [StageCost(1.0, 2.0)] * devices
    found, h1 = (simulate(name, range(devices), costs, micro_batches).speedup for name in ("zero_bubble", "zb-h1"))
    assert found >= h1 * (1 - 1e-9)


def test_long_updates_go_through_an_order_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_ouroboros.schedules.filling.LONGEST", 8)
    programs = device_programs("zero_bubble", [0, 1], [1.0, 1.0], [2.0, 2.0], 11)
    done = replay([p(slots_of(2, [11], frozenset(), False)) for p in programs], lambda i: 1.0, 2)
    assert sum(isinstance(e.instruction, WeightGradient) for e in done) == 11
    assert SCHEDULES["zero_bubble"].in_flight(1, 2, 11) == 3
