"""Bytes per stage: versions and flights as the update rule makes them, and the sum that the dynamic program uses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ouroboros.planning.memory_model import (
    MemoryOptions,
    StageMemory,
    memory_load,
    old_versions,
    stage_memory,
    ticks_in_flight,
    together,
)
from hf_ouroboros.planning.unit_facts import ModelFacts, UnitFacts
from hf_ouroboros.simulate.simulator import StageCost, simulate


def toy(layers: int = 6, tied: int = 20) -> ModelFacts:
    """Layers of growing size."""
    units = [UnitFacts(("wte",), "embedding", 20, 20, 0.0, 3.0, 7.0, 0.0)]
    units += [
        UnitFacts((f"h.{i}",), "layer", 10 + i, 10 + i, 1.0, 100.0 + i, 7.0, 1.0, later_bytes=211.0)
        for i in range(layers)
    ]
    units += [UnitFacts(("ln_f",), "head", 1, 1, 0.0, 0.0, 7.0, 0.0)]
    units += [UnitFacts(("lm_head",), "head", 0, 0 if tied else 20, 1.0, 50.0, 7.0, 1.0)]
    return ModelFacts("Toy", tuple(units), tied, None, 1, 1, torch.float32)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("stages", [1, 2, 5, 9])
def test_versions_by_counting(stages: int, micro_batches: int) -> None:
    options = MemoryOptions("pipelined", micro_batches)
    for stage in range(stages):
        delay = stages - 1 - stage
        # At the step that closes an update, the ticks whose backward is still to come hold the versions of theirs.
        held = [
            len({(close - 1 - i) // micro_batches for i in range(delay)})
            for close in range(10 * micro_batches, 14 * micro_batches, micro_batches)
        ]
        assert old_versions(stage, stages, options) == max(held)
        assert old_versions(stage, stages, MemoryOptions("1f1b", micro_batches)) == 0


@pytest.mark.parametrize("schedule", ["pipelined", "lockstep", "1f1b"])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_flights_are_those_of_the_simulator(schedule: str, micro_batches: int) -> None:
    found = simulate(schedule, range(5), [StageCost(1.0, 2.0)] * 5, micro_batches)
    options = MemoryOptions(schedule, micro_batches)
    assert found.ticks_in_flight == tuple(ticks_in_flight(k, 5, options) for k in range(5))


@pytest.mark.parametrize("micro_batches", [1, 3, 8, 16])
def test_a_divided_backward_keeps_no_more_than_is_planned(micro_batches: int) -> None:
    facts, options = toy(8), MemoryOptions("zero_bubble", micro_batches)
    units = [facts.units[:3], facts.units[3:5], facts.units[5:7], facts.units[7:]]
    kept = [sum(unit.activation_bytes for unit in own) for own in units]
    later = [sum(unit.later_bytes for unit in own) for own in units]
    costs = [StageCost(1.0, 2.0, activation_bytes=a, divided_bytes=b - a) for a, b in zip(kept, later, strict=True)]
    found = simulate("zero_bubble", range(4), costs, micro_batches)
    for stage, own in enumerate(units):
        assert found.ticks_in_flight[stage] <= ticks_in_flight(stage, 4, options)
        assert found.bytes_in_flight[stage] <= stage_memory(facts, own, stage, 4, options).activations
        assert old_versions(stage, 4, options) == 0


def test_a_divided_backward_by_hand() -> None:
    facts = toy()
    for recompute, kept in ((False, 5 * 2 * 211), (True, 5 * (7 + 2 * 211))):
        options = MemoryOptions("zero_bubble", 16, recompute)
        found = stage_memory(facts, facts.units[3:5], 1, 3, options)
        assert found.activations == kept  # of 2K - 1 micro-batches
        last = stage_memory(facts, facts.units[5:], 2, 3, options)
        assert last.activations == 211 + 211 + 50 + 4 * 2 * 211
        first = stage_memory(facts, facts.units[:3], 0, 3, options)
        assert first.activations == (3 + 100 + 101) * (1 if recompute else 5)


def test_a_stage_by_hand() -> None:
    facts = toy()
    first, last = facts.units[:3], facts.units[5:]
    found = stage_memory(facts, first, 0, 4, MemoryOptions("pipelined", 3))
    assert (found.weights, found.versions, found.gradients, found.optimizer) == (41, 41, 41, 2 * 41)
    assert found.activations == 4 * (3 + 100 + 101)
    assert (found.working, found.messages) == (0, 6 * 7)  # hidden states that were sent, and not asked about yet
    assert found.total == 5 * 41 + 4 * 204 + 42
    found = stage_memory(facts, last, 3, 4, MemoryOptions("pipelined", 2, optimizer="sgd"))
    assert (found.weights, found.versions, found.optimizer) == (14 + 15 + 1, 0, 0)
    assert found.gradients == 30 + 3 * 20  # the tied matrix's, waiting for the first stage
    assert found.activations == 104 + 105 + 50
    assert found.messages == 7 * 7  # gradients sent, and one received
    recomputed = stage_memory(facts, facts.units[3:5], 1, 4, MemoryOptions("pipelined", 2, recompute=True))
    assert recomputed.activations == 102 + 103 + 3 * 7  # one replayed, three inputs


def test_stages_of_one_device_work_in_turn() -> None:
    one, other = (StageMemory(1, 2, 3, 4, 5, working, 7) for working in (60, 6))
    assert together([one, other]) == StageMemory(2, 4, 6, 8, 10, 60, 14)
    assert together([one]) == one


def test_working_memory_is_that_of_the_largest_part() -> None:
    facts = toy()
    units = [
        replace(unit, working_bytes=size) for unit, size in zip(facts.units, (5, 9, 9, 9, 9, 9, 30, 0, 70), strict=True)
    ]
    facts = replace(facts, units=tuple(units))
    options = MemoryOptions("pipelined", 2)
    for stage, (start, stop, largest, messages) in enumerate(((0, 3, 9, 5), (3, 6, 9, 5 + 6), (6, 9, 70, 6))):
        found = stage_memory(facts, facts.units[start:stop], stage, 3, options)
        assert (found.working, found.messages) == (largest, messages * 7)
    load = memory_load(facts, 3, options)  # which has it once in every stage, whatever its layers
    for stage, (start, stop, layers) in enumerate(((0, 3, (0, 2)), (3, 6, (2, 5)), (6, 9, (5, 6)))):
        whole = stage_memory(facts, facts.units[start:stop], stage, 3, options).total
        largest = 30 - 9 if stage < 2 else 0
        assert sum(load.layers[stage][slice(*layers)]) + load.fixed[stage] == whole + largest


def test_copies_of_autocast_by_hand() -> None:
    facts = toy()
    units = [replace(unit, copied_bytes=4 if unit.kind == "layer" else 0) for unit in facts.units]
    first = stage_memory(facts, units[:3], 0, 4, MemoryOptions("pipelined", 2))
    assert first.versions == 3 * 8 + 2 * (41 - 16)  # copies of three versions; two older ones of what has none
    replayed = stage_memory(facts, units[:3], 0, 4, MemoryOptions("pipelined", 2, recompute=True))
    assert replayed.versions == 2 * 41 + 8  # a replay makes a copy of the old weights
    assert stage_memory(facts, units[:3], 0, 4, MemoryOptions("1f1b", 2)).versions == 8
    assert stage_memory(facts, units[5:], 3, 4, MemoryOptions("pipelined", 2)).versions == 8
    divided = MemoryOptions("zero_bubble", 5)
    assert stage_memory(facts, units[:3], 0, 4, divided).versions == 8
    assert stage_memory(facts, units[5:], 3, 4, divided).versions == 8  # of one graph at a time


def test_copies_of_frozen_weights_by_hand() -> None:
    """One for ever, besides the older versions of what is trained."""
    facts = toy()
    units = [
        replace(unit, trained_bytes=2, copied_bytes=1, frozen_copied_bytes=4) if unit.kind == "layer" else unit
        for unit in facts.units
    ]
    for micro_batches, old in ((1, 2), (2, 1)):
        found = stage_memory(facts, units[3:5], 1, 4, MemoryOptions("pipelined", micro_batches))
        assert found.versions == 2 * (4 + 1 + old * (2 - 1))
    replayed = stage_memory(facts, units[3:5], 1, 4, MemoryOptions("pipelined", 1, recompute=True))
    assert replayed.versions == 2 * (4 + 1 + 2 * 2)
    assert stage_memory(facts, units[3:5], 1, 4, MemoryOptions("pipelined", 1, weights="now")).versions == 2 * 5


def test_a_single_stage_keeps_what_scripts_see() -> None:
    facts = toy()
    assert stage_memory(facts, facts.units, 0, 1, MemoryOptions("pipelined", 2)).gradients == 2 * 96


def test_gradients_come_while_other_things_go() -> None:
    """Of the embedding, gradients are larger than activations; of a layer, they are not."""
    facts = toy()

    def gradients(stage: int, micro_batches: int, schedule: str = "pipelined") -> float:
        units = facts.units[:3] if stage == 0 else facts.units[3:5]
        return stage_memory(facts, units, stage, 4, MemoryOptions(schedule, micro_batches)).gradients

    assert [gradients(0, m) for m in (1, 2, 3, 4)] == [20 - 3, 20 - 3, 41, 41]  # 3, 2, 1, 1 old versions
    assert [gradients(2, m) for m in (1, 2, 3, 4)] == [
        0,
        0,
        0,
        0,
    ]  # one tick late: the first backward is the last with old weights
    assert [gradients(1, m) for m in (1, 2, 3, 4)] == [0, 25, 25, 25]
    assert [gradients(0, m, "1f1b") for m in (1, 2)] == [20 - 3, 41]


def test_weights_of_now_by_hand() -> None:
    facts, new = toy(), MemoryOptions("pipelined", 2, weights="now")
    middle = stage_memory(facts, facts.units[3:5], 1, 4, new)
    assert middle == replace(
        stage_memory(facts, facts.units[3:5], 1, 4, MemoryOptions("pipelined", 2, recompute=True)), versions=0.0
    )
    first = stage_memory(facts, facts.units[:3], 0, 4, new)
    assert first.versions == 2 * 20, "of the tied matrix, which the last stage is still to use"
    assert stage_memory(toy(tied=0), facts.units[:3], 0, 4, new).versions == 0
    assert stage_memory(facts, facts.units[5:], 3, 4, new) == stage_memory(
        facts, facts.units[5:], 3, 4, MemoryOptions("pipelined", 2)
    )
    for schedule in ("1f1b", "zero_bubble"):
        options = MemoryOptions(schedule, 2, weights="now")
        assert not options.replays and not old_versions(0, 4, options)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["pipelined", "lockstep", "1f1b", "zero_bubble"]),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True),
    st.sampled_from(["then", "now"]),
)
def test_the_sum_over_layers_is_the_whole(
    schedule: str, micro_batches: int, recompute: bool, tied: bool, cuts: list[int], weights: str
) -> None:
    facts = toy(tied=20 if tied else 0)
    options = MemoryOptions(schedule, micro_batches, recompute, weights=weights)
    bounds = [0, *sorted(cuts), 6]
    stages = len(bounds) - 1
    load = memory_load(facts, stages, options)
    for k, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        first, last = 0 if k == 0 else start + 1, len(facts.units) if k == stages - 1 else stop + 1
        whole = stage_memory(facts, facts.units[first:last], k, stages, options).total
        assert sum(load.layers[k][start:stop]) + load.fixed[k] == pytest.approx(whole)
