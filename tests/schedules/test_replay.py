"""Replaying programs: inputs come before what needs them, and a circle of waiting is named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ouroboros.schedules.instructions import Backward, Exchange, Forward, Instruction, Rendezvous, Report, Step
from hf_ouroboros.schedules.interleave import sample_slots
from hf_ouroboros.schedules.programs import dataflow_program, lockstep_program
from hf_ouroboros.schedules.replay import Deadlock, Executed, replay


def one(instruction: Instruction) -> float:
    """Forward 1, backward 2, everything else nothing."""
    return {Forward: 1.0, Backward: 2.0}.get(type(instruction), 0.0)


def test_two_stages_by_hand() -> None:
    programs = [
        [Forward(0, 0), Forward(0, 1), Backward(0, 0), Step(0, 0)],
        [Forward(1, 0), Backward(1, 0), Step(1, 0), Report()],
    ]
    executed = replay(programs, one, 2)
    times = {(e.device, e.instruction): (e.start, e.end) for e in executed}
    assert times == {
        (0, Forward(0, 0)): (0, 1),
        (0, Forward(0, 1)): (1, 2),
        (0, Backward(0, 0)): (4, 6),  # waits for stage 1
        (0, Step(0, 0)): (6, 6),
        (1, Forward(1, 0)): (1, 2),
        (1, Backward(1, 0)): (2, 4),
        (1, Step(1, 0)): (4, 4),
        (1, Report()): (4, 4),
    }


def test_nothing_to_do() -> None:
    assert replay([[], []], one, 2) == []


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.booleans(), st.booleans(), st.data())
def test_dependencies(stages: int, ticks: int, synchronous: bool, lockstep: bool, data: st.DataObject) -> None:
    """Each device one thing at a time, in program order; every instruction after its inputs."""
    slots = sample_slots(stages, ticks, synchronous)
    make = lockstep_program if lockstep else lambda s, n: dataflow_program(s, [0] * len(s), n)
    programs = [list(make([k], stages)(slots)) for k in range(stages)]
    costs = data.draw(st.lists(st.integers(1, 5), min_size=2 * stages, max_size=2 * stages))

    def duration(i: Instruction) -> float:
        if isinstance(i, (Forward, Backward)):
            return costs[2 * i.stage + isinstance(i, Backward)]
        return 0.0

    executed = replay(programs, duration, stages)
    end = {e.instruction: e.end for e in executed}
    for device in range(stages):
        own = [e for e in executed if e.device == device]
        assert [e.instruction for e in own] == programs[device]
        assert all(a.end <= b.start for a, b in zip(own, own[1:], strict=False))
    for e in executed:
        assert e.end - e.start == duration(e.instruction)
        if isinstance(e.instruction, Forward) and e.instruction.stage > 0:
            assert e.start >= end[Forward(e.instruction.stage - 1, e.instruction.tick)]
        if isinstance(e.instruction, Backward) and e.instruction.stage < stages - 1:
            assert e.start >= end[Backward(e.instruction.stage + 1, e.instruction.tick)]


@pytest.mark.parametrize("meeting", [Rendezvous(), Exchange(0)])
def test_meetings_happen_together(meeting: Instruction) -> None:
    executed = replay([[Forward(0, 0), meeting, Forward(0, 1)], [meeting, Forward(1, 0)]], one, 2)
    assert [e.start for e in executed if e.instruction == meeting] == [1, 1]
    assert Executed(1, Forward(1, 0), 1, 2) in executed


@pytest.mark.parametrize(
    "programs",
    [
        [[Backward(0, 0), Forward(0, 0)], [Forward(1, 0), Backward(1, 0)]],
        [[Rendezvous(), Forward(0, 0)], [Forward(1, 0), Rendezvous()]],
        [[Rendezvous()], []],
    ],
    ids=["backward before forward", "rendezvous before input", "nobody comes"],
)
def test_deadlock_says_where_everybody_stands(programs: list[list[Instruction]]) -> None:
    with pytest.raises(Deadlock) as caught:
        replay(programs, one, 2)
    heads = [program[0] if program else None for program in programs]
    assert str(caught.value) == f"the programs wait for each other: device 0 at {heads[0]}, device 1 at {heads[1]}"
