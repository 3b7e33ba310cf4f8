"""Any map of stages to devices, under every schedule: the reference's numbers to the last bit, in the simulated order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import Case, Run, assert_same_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainer_helpers import EVERY

from hf_ouroboros.engine.core import Engine
from hf_ouroboros.schedules import SCHEDULES, device_programs, names_where
from hf_ouroboros.schedules.instructions import Backward, Forward, Step, WeightGradient
from hf_ouroboros.schedules.interleave import engine_costs, run_slots
from hf_ouroboros.schedules.replay import replay
from hf_ouroboros.simulate.timeline import Timeline

DEVICES = names_where(lambda schedule: schedule.uses_devices)
LAYERS = 7
KINDS = {Forward: "forward", WeightGradient: "weights", Step: "step"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@st.composite
def placed_cases(draw: st.DrawFn) -> Case:
    """K <= 8 stages on D <= 4 devices, neighbours together or not, the first and the last one without layers or not."""
    stages, tied = draw(st.integers(2, 8)), draw(st.booleans())
    raw = draw(st.lists(st.integers(0, 3), min_size=stages, max_size=stages))
    if tied:
        raw[-1] = raw[0]
    order = list(dict.fromkeys(raw))
    inner = sorted(
        draw(st.lists(st.integers(1, LAYERS - 1), min_size=stages - 3, max_size=stages - 3, unique=True))
        if stages > 3
        else []
    )
    bounds = (
        [draw(st.integers(0, 1)), *inner, LAYERS - draw(st.integers(0, 1))]
        if stages > 2
        else [draw(st.integers(0, LAYERS))]
    )
    cuts = [0, *bounds, LAYERS]
    counts = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]
    if 0 in counts[1:-1]:
        counts = [1] * (stages - 1) + [LAYERS - stages + 1]
    return Case(
        stages,
        updates=tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))),
        tied=tied,
        dropout=draw(st.sampled_from([0.0, 0.2])),
        optimizer=draw(st.sampled_from(["sgd", "adamw"])),
        clip=draw(st.sampled_from([None, 0.3])),
        warmup=draw(st.integers(0, 1)),
        recompute=draw(st.booleans()),
        layers=LAYERS,
        counts=tuple(counts),
        weights=draw(st.sampled_from(["then", "now"])),
        placement=tuple(order.index(device) for device in raw),
    )


def fitting(case: Case, schedule: str) -> Case:
    """The case as a schedule can execute it: where no backward is late, there are no weights of now."""
    return dataclasses.replace(case, weights="then") if SCHEDULES[schedule].is_synchronous else case


def assert_equal_to_reference(case: Case, schedule: str, looks: dict[int, str] | None = None) -> None:
    rule = "reference 1f1b" if SCHEDULES[schedule].is_synchronous else "reference"
    assert_same_run(Run(case, rule).train(looks), Run(case, schedule).train(looks))


FIXED = {
    "round robin": Case(
        6, (2, 3, 1), False, 0.2, layers=LAYERS, counts=(1, 1, 2, 1, 1, 1), placement=(0, 1, 2, 0, 1, 2)
    ),
    "snake of two rounds": Case(
        7, (2, 1, 4), True, 0.2, layers=LAYERS, counts=(0, 1, 2, 1, 2, 1, 0), placement=(0, 1, 2, 0, 1, 2, 0)
    ),
    "there and back": Case(6, (1,) * 5, True, layers=LAYERS, counts=(2, 1, 1, 1, 1, 1), placement=(0, 1, 2, 2, 1, 0)),
}

MAIN = "snake of two rounds"


@pytest.mark.parametrize("schedule", DEVICES)
@pytest.mark.parametrize(
    "name", [name if name == MAIN else pytest.param(name, marks=pytest.mark.slow) for name in FIXED]
)
def test_fixed_placements(name: str, schedule: str) -> None:
    assert_equal_to_reference(FIXED[name], schedule, {1: "state"})


@pytest.mark.slow
@settings(max_examples=200 if EVERY else 6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    placed_cases(),
    st.sampled_from(DEVICES),
    st.dictionaries(st.integers(0, 3), st.sampled_from(["settle", "norm", "state"]), max_size=2),
)
def test_random_placements(case: Case, schedule: str, looks: dict[int, str]) -> None:
    assert_equal_to_reference(fitting(case, schedule), schedule, looks)


@pytest.mark.slow
@settings(max_examples=60 if EVERY else 4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(placed_cases(), st.sampled_from(DEVICES))
def test_executed_in_the_simulated_order(case: Case, schedule: str) -> None:
    ticks, updates = case.updates[0], len(case.updates)
    case = dataclasses.replace(fitting(case, schedule), updates=(ticks,) * updates, warmup=0)
    run = Run(case, schedule)
    engine = run.engine
    assert isinstance(engine, Engine)
    plan = engine.partition.plan
    timeline = Timeline(len(plan.devices))
    for worker in engine._workers:
        worker._timeline = timeline
    run.train()
    costs = engine_costs([row.cost for row in plan.rows], engine.settings.replayed_by is not None)
    programs = device_programs(schedule, plan.placement, *costs, ticks)
    slots = run_slots(case.stages, ticks, updates, SCHEDULES[schedule].is_synchronous)
    expected = [
        (
            e.device,
            KINDS.get(type(e.instruction), "backward"),
            e.instruction.stage,
            getattr(e.instruction, "tick", getattr(e.instruction, "update", None)),
        )
        for e in replay([program(slots) for program in programs], lambda i: 1.0, case.stages)
        if isinstance(e.instruction, (Forward, Backward, WeightGradient, Step))
    ]
    for device in range(len(plan.devices)):
        found = sorted((e for e in timeline.events if e.device == device), key=lambda e: e.start)
        assert [(e.device, e.kind, e.stage, e.index) for e in found] == [e for e in expected if e[0] == device]
