"""weights="now": the engine equals its reference to the last bit, resumes, and keeps no older weights."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Case, Run, assert_same_run, differences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_helpers import CUT, StreamCase
from trainer_helpers import EVERY

from hf_ouroboros.engine.state import RunState
from hf_ouroboros.errors import CheckpointMismatchError

LOOKS = ["synchronize", "settle", "norm", "state"]
SCHEDULES = ["pipelined", "lockstep"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def now(stages: int = 3, **given: Any) -> Case:
    return Case(stages, weights="now", **given)


def assert_equal_to_reference(case: Case, schedule: str, looks: dict[int, str] | None = None) -> None:
    assert_same_run(Run(case, "reference").train(looks), Run(case, schedule).train(looks))


CASES = [
    now(2, updates=(1,) * 5, clip=0.2),
    now(4, updates=(1,) * 9, dropout=0.2),
    now(4, updates=(3, 1, 2, 3), padded=True, optimizer="nadam"),
    now(4, updates=(1, 2, 1, 2, 1, 2), warmup=3, tied=False, recompute=True),
    now(5, updates=(1, 1), devices=2),
    now(6, updates=(1,) * 8),  # the last stage is the head alone
    now(3, updates=(4, 4, 3), compensation="error_feedback+lr_rescale"),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_equal_to_the_reference(case: Case, schedule: str) -> None:
    assert_equal_to_reference(case, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES if EVERY else SCHEDULES[:1])
@pytest.mark.parametrize("case", CASES[4:], ids=str)
def test_other_cases(case: Case, schedule: str) -> None:
    assert_equal_to_reference(case, schedule)


@pytest.mark.slow
def test_lockstep_with_a_global_norm() -> None:
    case = now(4, updates=(1, 2, 1, 1, 2), clip=0.3, scope="global", dropout=0.1)
    assert_equal_to_reference(case, "lockstep", {2: "state"})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return now(
        draw(st.integers(1, 5)),
        updates=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))),
        tied=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.2])),
        optimizer=draw(st.sampled_from(["sgd", "adamw", "adafactor", "muon"])),
        clip=draw(st.sampled_from([None, 0.3])),
        warmup=draw(st.integers(0, 3)),
        recompute=draw(st.booleans()),
        padded=draw(st.booleans()),
        devices=draw(st.sampled_from([None, 1, 2, 3])),
    )


@pytest.mark.slow
@settings(max_examples=60 if EVERY else 6, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.dictionaries(st.integers(0, 5), st.sampled_from(LOOKS), max_size=3), st.sampled_from(SCHEDULES))
def test_any_run_looked_at_or_not(case: Case, looks: dict[int, str], schedule: str) -> None:
    assert_equal_to_reference(case, schedule, looks)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES if EVERY else SCHEDULES[:1])
def test_looking_changes_nothing(schedule: str) -> None:
    case = now(4, updates=(2, 1, 3, 2, 1, 2), dropout=0.2, warmup=1)
    plain = Run(case, schedule).train()
    looked = Run(case, schedule).train(dict(enumerate(["settle", *LOOKS, "settle"])))
    looked.grad_norms = {-1: looked.grad_norms[-1]}
    assert_same_run(plain, looked)


def test_bfloat16_autocast() -> None:
    found = []
    for kind in ("reference", "pipelined"):
        run = Run(now(4), kind)
        object.__setattr__(run.engine.settings, "autocast_dtype", torch.bfloat16)
        found.append(run.train())
    assert_same_run(*found)


@pytest.mark.parametrize("groups", [1, 2])
def test_memories_of_a_stream(groups: int) -> None:
    case = StreamCase(4, updates=(1, 2) * 3, dropout=0.1, config=CUT, groups=groups, epoch=3, weights="now")
    assert_same_run(Run(case, "reference").train(), Run(case, "pipelined").train())


def test_it_is_another_rule() -> None:
    """With inputs of then, and weights of now."""
    then, new = (Run(replace(now(updates=(1,) * 6), weights=w), "pipelined").train() for w in ("then", "now"))
    assert differences(then.model.state_dict(), new.model.state_dict()) and then.losses[:3] == new.losses[:3]


# ---- resuming ----


def begun(case: Case, schedule: str, at: int) -> tuple[Run, dict[str, Any]]:
    run = Run(case, schedule)
    try:
        for u in range(at):
            run.update(u)
        checkpoint = run.checkpoint()
    finally:
        run.engine.close()
    run.hear()
    return run, checkpoint


RESUMED = now(4, updates=(1, 2, 1, 3, 1, 1), dropout=0.2, padded=True)


@pytest.mark.parametrize("at", [1, 3, 5] if EVERY else [3])
def test_resumes_under_every_schedule(at: int) -> None:
    whole = Run(RESUMED, "reference").train()
    for first, second in [("pipelined", "reference"), ("reference", "lockstep"), ("lockstep", "pipelined")]:
        run, checkpoint = begun(RESUMED, first, at)
        resumed = Run(RESUMED, second).resume(checkpoint).train(updates=range(at, 6))
        assert differences(whole.model.state_dict(), resumed.model.state_dict()) == []
        assert run.losses + resumed.losses == whole.losses


def test_a_checkpoint_is_the_same_under_every_schedule() -> None:
    found = [begun(RESUMED, schedule, 3)[1] for schedule in ("pipelined", "lockstep", "reference")]
    assert found[0]["meta"] == found[1]["meta"] == found[2]["meta"]
    assert found[0]["tensors"] == found[1]["tensors"] == found[2]["tensors"]


@pytest.mark.slow
def test_resumes_a_stream() -> None:
    case = StreamCase(4, updates=(2,) * 6, config=CUT, groups=2, epoch=3, weights="now")
    whole = Run(case, "reference").train()
    for at in range(1, 6) if EVERY else (3,):
        _, checkpoint = begun(case, "pipelined", at)
        resumed = Run(case, "pipelined").resume(checkpoint).train(updates=range(at, 6))
        assert differences(whole.model.state_dict(), resumed.model.state_dict()) == []


def refusal(case: Case, state: RunState) -> str:
    run = Run(case, "pipelined")
    try:
        with pytest.raises(CheckpointMismatchError) as caught:
            run.engine.load_state_dict(state)
    finally:
        run.engine.close()
    return str(caught.value)


def state_of(case: Case) -> RunState:
    run = Run(case, "pipelined")
    try:
        for u in range(3):
            run.update(u)
        return run.engine.state_dict()
    finally:
        run.engine.close()


def test_checkpoints_of_another_rule_are_refused() -> None:
    case = now(4, counts=(2, 1, 1, 1))
    state, other = state_of(case), state_of(replace(case, weights="then"))
    assert "written with weights='now', this run has 'then'" in refusal(replace(case, weights="then"), state)
    assert "written with weights='then', this run has 'now'" in refusal(case, other)
    assert "resume with the same device_map" in refusal(replace(case, counts=(1, 2, 1, 1)), state)
    for stage, name in (
        (0, "head.transformer.wte.weight"),
        (1, "received.hidden_states"),
        (1, "gradient.hidden_states"),
    ):
        damaged = RunState.from_parts(state.meta(), state.tensors())
        ticks = damaged.pending[stage]
        names = [n for n in ticks[min(ticks)] if n.startswith(name.partition(".")[0])]
        assert names, sorted(ticks[min(ticks)])
        for each in names:
            del ticks[min(ticks)][each]
        assert "has no " + name.partition(".")[0] in refusal(case, damaged)


# ---- memory ----


def live_copies(case: Case, schedule: str = "pipelined") -> dict[str, int]:
    """How many tensors of the shape of a layer's matrix are there, and of the tied one, while micro-batches are in flight."""
    run = Run(case, schedule)
    try:
        for u in range(8):
            run.update(u)
        run.engine.synchronize()
        assert all(len(r.in_flight) == case.stages - 1 - k for k, r in run.engine._runners.items())
        gc.collect()
        shapes = {
            "layer": run.model.transformer.h[0].attn.c_attn.weight.shape,
            "tied": run.model.transformer.wte.weight.shape,
        }
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu"]
        tensors += [t for r in run.engine._runners.values() for t in r._versions.parameters.values()]
        leaves = [x for r in run.engine._runners.values() for i in r.in_flight.values() for x in i.leaves.values()]
        return {
            name: len({t.untyped_storage().data_ptr() for t in [*tensors, *leaves] if t.shape == shape})
            for name, shape in shapes.items()
        }
    finally:
        run.engine.close()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_older_weights_are_kept(schedule: str) -> None:
    """K = 4, M = 1: with weights of then, stage k has K-1-k older versions. The model is the only one alive."""
    case = Case(4, updates=(1,) * 8, optimizer="plain sgd", counts=(2, 1, 1, 1), devices=3)
    gc.collect()
    then, new = live_copies(case, schedule), live_copies(replace(case, weights="now"), schedule)
    assert new["layer"] == 5, "one of each layer"
    assert then["layer"] == 5 + 2 * 3 + 1 * 2 + 1 * 1
    assert new["tied"] < then["tied"]


def test_weights_stay_where_they_are() -> None:
    """No step moves a parameter to fresh storage, but for the tied matrix while the last stage uses an older one."""
    run = Run(now(4, updates=(1,) * 6), "pipelined")
    try:
        before = {name: p.data_ptr() for name, p in run.model.named_parameters()}
        for u in range(6):
            run.update(u)
        run.engine.synchronize()
        moved = {name for name, p in run.model.named_parameters() if p.data_ptr() != before[name]}
        assert moved <= {"transformer.wte.weight"}
        assert not any(item.leaves for runner in run.engine._runners.values() for item in runner.in_flight.values())
    finally:
        run.engine.close()
