"""The state of a run: what it holds, that it survives JSON and safetensors, and every reason to refuse one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Case, Run, clone, differences
from safetensors.torch import load, save

from hf_ouroboros.engine.state import RunState
from hf_ouroboros.errors import CheckpointError

CASE = Case(stages=4, updates=(2, 1, 2, 1), tied=True)


def run_until(updates: int, case: Case = CASE, schedule: str = "pipelined") -> RunState:
    """The state after some updates."""
    torch.set_num_threads(1)
    run = Run(case, schedule)
    try:
        for u in range(updates):
            run.update(u)
        return run.engine.state_dict()
    finally:
        run.engine.close()


@pytest.fixture(scope="module")
def state() -> RunState:
    return run_until(3)


def load_into(state: RunState, case: Case = CASE, schedule: str = "pipelined") -> None:
    run = Run(case, schedule)
    try:
        run.engine.load_state_dict(state)
    finally:
        run.engine.close()


def test_content(state: RunState) -> None:
    assert (state.num_stages, state.tied_gradient, state.seed) == (4, "joint", 3)
    assert (state.tick, state.update, state.delay_start) == (5, 3, 0)
    assert {k: sorted(ticks) for k, ticks in state.pending.items()} == {0: [2, 3, 4], 1: [3, 4], 2: [4], 3: []}
    names = set(state.pending[0][2])
    assert "transformer.wte.weight" in names and "transformer.h.0.attn.c_attn.bias" in names
    assert not any("lm_head" in key for key in state.tensors())


def test_state_of_a_fresh_run() -> None:
    fresh = run_until(0)
    assert (fresh.tick, fresh.update, fresh.delay_start, fresh.tensors()) == (0, 0, None, {})
    load_into(fresh)


@pytest.mark.parametrize("schedule", ["reference", "lockstep"])
def test_same_under_every_schedule(state: RunState, schedule: str) -> None:
    other = run_until(3, schedule=schedule)
    assert other.meta() == state.meta()
    assert differences(state.tensors(), other.tensors()) == []


def test_round_trip(state: RunState) -> None:
    meta = json.loads(json.dumps(state.meta()))
    tensors = load(save({k: v.contiguous() for k, v in state.tensors().items()}))
    again = RunState.from_parts(meta, tensors)
    assert again.meta() == state.meta()
    assert differences(state.pending, again.pending) == []
    load_into(again)


def test_delays_before_their_start() -> None:
    warm = run_until(2, replace(CASE, warmup=2))
    assert warm.delay_start is None and warm.tensors() == {}
    later = run_until(3, replace(CASE, warmup=2))
    assert later.delay_start == 3 and sorted(later.pending[0]) == [3, 4]


# ---- damaged ----


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda meta, tensors: meta.update(format=9), "has format 9, this version reads format 4"),
        (lambda meta, tensors: meta.pop("format"), "has format None"),
        (lambda meta, tensors: meta.pop("tick"), "damaged: KeyError: 'tick'"),
        (lambda meta, tensors: meta.pop("pending_ticks"), "damaged: KeyError: 'pending_ticks'"),
        (lambda meta, tensors: meta.update(pending_ticks=[1, 2]), "damaged: AttributeError"),
        (lambda meta, tensors: meta.update(pending_ticks={"x": [1]}), "damaged: ValueError"),
        (lambda meta, tensors: meta.update(pending_ticks={"0": 3}), "damaged: TypeError"),
        (lambda meta, tensors: meta.update(tick="5"), "damaged: ValueError: tick is '5', not a whole number"),
        (lambda meta, tensors: meta.update(delay_start=1.5), "delay_start is 1.5, not a whole number"),
        (lambda meta, tensors: meta.update(seed=None), "seed is None, not a whole number"),
        (lambda meta, tensors: tensors.update(weights=torch.zeros(1)), "damaged: ValueError"),
        (lambda meta, tensors: tensors.update({"other.0.2.a": torch.zeros(1)}), "unknown tensor other.0.2.a"),
        (lambda meta, tensors: tensors.update({"pending.0.9.a": torch.zeros(1)}), "damaged: KeyError: 9"),
        (lambda meta, tensors: tensors.update({"pending.7.2.a": torch.zeros(1)}), "damaged: KeyError: 7"),
    ],
)
def test_damaged_parts(state: RunState, damage: Callable[[Any, Any], Any], message: str) -> None:
    meta, tensors = state.meta(), state.tensors()
    damage(meta, tensors)
    with pytest.raises(CheckpointError, match=message):
        RunState.from_parts(meta, tensors)


@pytest.mark.parametrize("meta", [[1], None, "text"])
def test_meta_of_another_kind(meta: Any) -> None:
    with pytest.raises(CheckpointError, match="instead of a mapping"):
        RunState.from_parts(meta, {})


@pytest.mark.parametrize("schedule", ["pipelined", "reference"])
def test_incomplete_tensors(state: RunState, schedule: str) -> None:
    tensors = state.tensors()
    del tensors["pending.1.4.transformer.h.1.ln_1.weight"]
    with pytest.raises(CheckpointError, match="no pending gradient of 'transformer.h.1.ln_1.weight' at tick 4, which"):
        load_into(RunState.from_parts(state.meta(), tensors), schedule=schedule)


@pytest.mark.parametrize("schedule", ["pipelined", "lockstep", "reference"])
def test_state_is_a_copy(schedule: str) -> None:
    """Neither the run that wrote it nor one that continues it changes a state."""
    torch.set_num_threads(1)
    case = replace(CASE, updates=(3,) * 4, clip=0.01)
    run = Run(case, schedule)
    try:
        run.update(0)
        run.update(1)
        state = run.engine.state_dict()
        before = clone(state.tensors())
        run.train(updates=range(2, 4))
        assert differences(before, state.tensors()) == []
        other = Run(case, schedule)
        other.engine.load_state_dict(state)
        other.train(updates=range(2, 4))
        assert differences(before, state.tensors()) == []
    finally:
        run.engine.close()


# ---- foreign ----


def without(pending: dict[int, Any], stage: int, tick: int) -> dict[int, Any]:
    return {k: {t: g for t, g in ticks.items() if (k, t) != (stage, tick)} for k, ticks in pending.items()}


def renamed(pending: dict[int, Any], **gradients: torch.Tensor) -> dict[int, Any]:
    return {k: {t: {**g, **gradients} if (k, t) == (1, 4) else g for t, g in ts.items()} for k, ts in pending.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"num_stages": 3}, "written with 3 stages, this run has 4; resume with num_stages=3"),
        (lambda s: {"tied_gradient": "paper"}, "written with tied_gradient='paper', this run has 'joint'"),
        (lambda s: {"pending": without(s.pending, 0, 3)}, r"of stage 0 are of ticks \[2, 4\], expected \[2, 3, 4\]"),
        (lambda s: {"pending": {}}, r"of stage 0 are of ticks \[\], expected \[2, 3, 4\]"),
        (lambda s: {"tick": 6}, r"expected \[3, 4, 5\]"),
        (lambda s: {"delay_start": 3}, r"of stage 0 are of ticks \[2, 3, 4\], expected \[3, 4\]"),
        (lambda s: {"delay_start": None}, r"of stage 0 are of ticks \[2, 3, 4\], expected \[\]"),
        (
            lambda s: {"pending": renamed(s.pending, nonsense=torch.zeros(2))},
            r"pending gradient of 'nonsense' \(2,\) for stage 1, which does not hold .*same device_map",
        ),
    ],
)
@pytest.mark.parametrize("schedule", ["pipelined", "reference"])
def test_foreign_state(state: RunState, change: Callable[[RunState], dict], message: str, schedule: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_into(replace(state, **change(state)), schedule=schedule)


def test_gradient_of_another_shape(state: RunState) -> None:
    name = next(iter(state.pending[1][4]))
    pending = {**state.pending, 1: {**state.pending[1], 4: {**state.pending[1][4], name: torch.zeros(3, 3, 3)}}}
    with pytest.raises(CheckpointError, match=r"\(3, 3, 3\) for stage 1"):
        load_into(replace(state, pending=pending))


def test_other_split() -> None:
    case = replace(CASE, counts=(2, 1, 1, 1))
    with pytest.raises(CheckpointError, match="which does not hold such a parameter; resume with the same device_map"):
        load_into(run_until(3, case), replace(case, counts=(1, 2, 1, 1)))


def test_split_that_holds_more_layers_where_gradients_are_pending() -> None:
    """A layer came from the last stage, which has no delay and nothing pending."""
    case = replace(CASE, counts=(1, 1, 1, 2))
    with pytest.raises(CheckpointError, match="no pending gradient of 'transformer.h.3.*device_map"):
        load_into(run_until(3, case), replace(case, counts=(1, 1, 2, 1)))


@pytest.mark.parametrize(("schedule", "case"), [("1f1b", CASE), ("pipelined", replace(CASE, warmup=9))])
def test_delayed_gradients_need_delays(state: RunState, schedule: str, case: Case) -> None:
    with pytest.raises(CheckpointError, match="holds delayed gradients that are still to be applied.*schedule="):
        load_into(state, case, schedule)


def test_tied_rule_does_not_matter_without_tie() -> None:
    case = replace(CASE, tied=False)
    load_into(replace(run_until(2, case), tied_gradient="paper"), case)
