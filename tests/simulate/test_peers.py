"""Programs of the schedules that we compare with: their closed formulas, and that nothing is left out."""

from __future__ import annotations

from collections import Counter

import pytest

from hf_ouroboros.schedules.instructions import (
    Backward,
    Forward,
    InputGradient,
    Instruction,
    Step,
    WeightGradient,
)
from hf_ouroboros.schedules.replay import replay
from hf_ouroboros.simulate.peers import CHUNKS, PEERS, peer_placement, peer_programs

# Time of one update with F = B = W = 1 per device.
FORMULAS = {
    "naive": lambda d, m: 3 * m * d,
    "gpipe": lambda d, m: 3 * (m + d - 1),
    "interleaved": lambda d, m: 3 * (m + (d - 1) / CHUNKS),
    "zb-h1": lambda d, m: 3 * m + (d - 1),
    "zb-v": lambda d, m: 3 * m,
    "dualpipev": lambda d, m: 3 * m + (d - 1) / 2,
}
LEAST = {"zb-v": 2, "dualpipev": 2}
"""Micro-batches per device."""
LATER = {"zb-v": 0.5}
"""So much later per device does the last one begin and end, once in a run."""
DIVIDED = ("zb-h1", "zb-v", "dualpipev")


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(
    ("devices", "micro_batches", "updates"), [(1, 2, 1), (2, 4, 3), (4, 4, 2), (4, 8, 3), (8, 16, 2)]
)
def test_closed_formula(name: str, devices: int, micro_batches: int, updates: int) -> None:
    micro_batches = max(micro_batches, LEAST.get(name, 1) * devices)
    stages = len(peer_placement(name, devices))
    part = devices / stages  # of a device's work that one stage has

    def duration(i: object) -> float:
        whole = {Forward: 1.0, Backward: 2.0, InputGradient: 1.0, WeightGradient: 1.0, Step: 0.0}
        return whole[type(i)] * part

    programs = peer_programs(name, devices, micro_batches, updates)
    end = max(executed.end for executed in replay(programs, duration, stages))
    assert end == updates * FORMULAS[name](devices, micro_batches) + LATER.get(name, 0.0) * (devices - 1)


def parts(instruction: Instruction) -> list[Instruction]:
    """A backward as its two parts."""
    if type(instruction) is Backward:
        return [kind(instruction.stage, instruction.tick) for kind in (InputGradient, WeightGradient)]
    return [instruction]


@pytest.mark.parametrize("name", PEERS)
def test_everything_happens_once_and_where_it_belongs(name: str) -> None:
    programs, placement = peer_programs(name, 4, 8, 2), peer_placement(name, 4)
    counts = Counter(i for program in programs for i in program)
    if name == "dualpipev":  # some of its backwards are whole, others are not
        counts = Counter(part for i in counts.elements() for part in parts(i))
    kinds = (Forward, InputGradient, WeightGradient) if name in DIVIDED else (Forward, Backward)
    expected = [kind(k, t) for kind in kinds for k in range(len(placement)) for t in range(16)]
    expected += [Step(k, u) for k in range(len(placement)) for u in range(2)]
    assert counts == Counter(expected)
    assert all(placement[i.stage] == device for device, program in enumerate(programs) for i in program)


@pytest.mark.parametrize("name", PEERS)
def test_gradients_are_those_of_one_version(name: str) -> None:
    """Synchronous: a stage's step comes after all it did for the update, and before anything of the next."""
    for program in peer_programs(name, 3, 6, 2):
        for stage in {i.stage for i in program}:
            own = [i for i in program if i.stage == stage]
            middle = own.index(Step(stage, 0))
            assert all(i.tick < 6 for i in own[:middle])
            assert all(i.tick >= 6 for i in own[middle + 1 :] if not isinstance(i, Step))


def test_wrong_input_is_named() -> None:
    with pytest.raises(
        ValueError, match="'fast' is unknown; use one of naive, gpipe, interleaved, zb-h1, zb-v, dualpipev"
    ):
        peer_programs("fast", 2, 4, 1)
    with pytest.raises(ValueError, match="7 micro-batches can't be divided into 3 equal rounds"):
        peer_programs("interleaved", 2, 7, 1)
