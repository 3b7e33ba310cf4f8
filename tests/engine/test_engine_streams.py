"""Memories through the engine: every schedule equals the reference to the last bit, which equals a plain loop."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Run, assert_same_run, make_optimizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from stream_helpers import CUT, CUT_ONE_TABLE, StreamCase, stream_batch, tiny_xl
from trainer_helpers import EVERY

from hf_ouroboros.engine.state import RunState
from hf_ouroboros.errors import CheckpointError, StreamError

UNTIED_PROJECTIONS = {**CUT, "proj_share_all_but_first": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "div_val 4": CUT,
    "div_val 1": CUT_ONE_TABLE,
    "untied projections": UNTIED_PROJECTIONS,
    "first projection tied": {**CUT, "tie_projs": [True, False, True]},
    "published": {**CUT, "mem_init": "zeros", "same_length": True, "clamp_len": 4},
    "norm first": {"pre_lnorm": True, "mem_len": 3},
    "eager": {"attn_implementation": "eager"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("ouroboros")] == []


# ---- equal to the reference ----


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("micro_batches", "groups"), [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_every_schedule_equals_the_reference(stages: int, micro_batches: int, groups: int) -> None:
    """M micro-batches that split the columns, that are consecutive segments, and both; an epoch ends in between."""
    case = StreamCase(
        stages=stages,
        updates=(micro_batches,) * (12 // micro_batches),
        dropout=0.1,
        clip=0.5,
        groups=groups,
        epoch=4,
        config=CUT,
    )
    expected = Run(case, "reference").train()
    for schedule in ("lockstep", "pipelined"):
        assert_same_run(expected, Run(case, schedule).train())
    drained = Run(case, "reference 1f1b").train()
    assert_same_run(drained, Run(case, "1f1b").train())


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_kind_of_model(kind: str, tied: bool) -> None:
    case = StreamCase(updates=(2,) * 5, tied=tied, dropout=0.1, config=CONFIGS[kind], devices=2)
    expected = Run(case, "reference").train()
    for schedule in ("lockstep", "pipelined"):
        assert_same_run(expected, Run(case, schedule).train())


@pytest.mark.parametrize("kind", ["plain", "div_val 1", "untied projections"])
def test_the_papers_tied_gradient(kind: str) -> None:
    """Several matrices are tied, and all get their output side's gradient at once."""
    case = StreamCase(updates=(1,) * 6, tied_gradient="paper", dropout=0.1, config=CONFIGS[kind])
    expected = Run(case, "reference").train()
    assert_same_run(expected, Run(case, "lockstep").train())
    joint = Run(replace(case, tied_gradient="joint"), "reference").train()
    assert joint.losses != expected.losses


@st.composite
def cases(draw: st.DrawFn) -> StreamCase:
    return StreamCase(
        stages=draw(st.integers(1, 5)),
        updates=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))),
        tied=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.2])),
        optimizer="adamw",
        warmup=draw(st.integers(0, 3)),
        recompute=draw(st.booleans()),
        compensation=draw(st.sampled_from(["none", "none", "weight_prediction", "error_feedback"])),
        devices=draw(st.sampled_from([None, 1, 2, 3])),
        groups=draw(st.integers(1, 3)),
        epoch=draw(st.integers(1, 4)),
        config=CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))],
    )


@pytest.mark.slow
@settings(max_examples=20 if EVERY else 12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from(["lockstep", "pipelined"]), st.integers(0, 5), st.sampled_from(["settle", "state"]))
def test_any_run_looked_at_or_not(case: StreamCase, schedule: str, update: int, look: str) -> None:
    expected = Run(case, "reference").train({update: look})
    assert_same_run(expected, Run(case, schedule).train({update: look}))


# ---- equal to a plain loop ----


@pytest.mark.parametrize("groups", [1, 2])
def test_one_stage_is_a_plain_loop_that_carries_mems(groups: int) -> None:
    case = StreamCase(stages=1, updates=(2,) * 4, groups=groups, epoch=3, config=CUT, optimizer="sgd")
    model, losses = tiny_xl(**CUT).train(), []
    optimizer = make_optimizer("sgd", model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: 1 / (1 + 0.1 * u))
    mems: dict[int, Any] = {}
    for update in range(4):
        batches = case.batches(update)
        for batch in batches:
            group, segment = int(batch["stream_columns"][0]), int(batch["stream_segments"][0])
            targets = {"shift_labels": batch["shift_labels"], "num_items_in_batch": case.targets(batches)}
            given = mems.get(group) if segment else None
            output = model(batch["input_ids"], mems=given, labels=batch["labels"], **targets)
            output.loss.backward()
            mems[group] = output.mems
            losses.append(output.loss.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    found = Run(case, "pipelined").train()
    assert found.losses == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.model.parameters(), strict=True))


def test_memories_matter() -> None:
    """What these tests compare depends on the memories."""
    losses = {}
    for mem_len in (0, 3, 7):
        case = StreamCase(updates=(1,) * 4, config={"mem_len": mem_len})
        losses[mem_len] = Run(case, "pipelined").train().losses
    assert losses[0][0] == losses[3][0] == losses[7][0]  # the first segment has none
    assert len({tuple(found[1:]) for found in losses.values()}) == 3


def test_recompute_replays_with_the_memory_of_then() -> None:
    case = StreamCase(stages=4, updates=(1,) * 8, dropout=0.1, config=CUT)
    expected = Run(case, "pipelined").train()
    assert_same_run(expected, Run(replace(case, recompute=True), "pipelined").train())


# ---- resuming ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written", "continued"), [("pipelined", "lockstep"), ("lockstep", "reference"), ("reference", "pipelined")]
)
@pytest.mark.parametrize(("groups", "stages"), [(1, 4), (2, 3)])
def test_resumed_within_an_epoch(written: str, continued: str, groups: int, stages: int) -> None:
    case = StreamCase(stages=stages, updates=(2,) * 6, dropout=0.1, groups=groups, config=CUT)
    expected = Run(case, "reference").train()
    second = Run(case, continued).resume(first_state(case, written)).train(updates=range(3, 6))
    assert second.losses == expected.losses[6:]
    assert all(torch.equal(a, b) for a, b in zip(expected.model.parameters(), second.model.parameters(), strict=True))


def first_state(case: StreamCase, schedule: str) -> dict[str, Any]:
    run = Run(case, schedule)
    try:
        for update in range(3):
            run.update(update)
        return run.checkpoint()
    finally:
        run.engine.close()


def test_a_state_without_its_memories_is_refused() -> None:
    """A file that lacks a tensor, a model that remembers nothing, columns of another number."""
    case = StreamCase(updates=(1,) * 3)
    complete = first_state(case, "pipelined")
    state = RunState.from_parts(json.loads(complete["meta"]), load(complete["tensors"]))
    incomplete, wider = copy.deepcopy(state), copy.deepcopy(state)
    del incomplete.memories[1][0]["transformer.layers.2"]
    wider.streams[0] = (3, 3)
    for schedule in ("pipelined", "reference"):
        for broken, config, message in (
            (
                incomplete,
                {},
                r"memories of stage 1 for columns 0 to 1 are not those of its layers \(transformer\.layers\.1",
            ),
            (wider, {}, r"memories of stage 0 for columns 0 to 2 are not those"),
            (state, {"mem_len": 0}, r"are not those of its layers \(none has any\).*same device_map and mem_len"),
        ):
            run = Run(replace(case, config=config), schedule)
            try:
                with pytest.raises(CheckpointError, match=message):
                    run.engine.load_state_dict(broken)
            finally:
                run.engine.close()


# ---- refusals ----


@pytest.mark.parametrize("schedule", ["pipelined", "reference"])
def test_a_batch_out_of_order_is_refused_and_the_run_goes_on(schedule: str) -> None:
    case = StreamCase(updates=(1,) * 4)
    expected = Run(case, "reference").train()
    run = Run(case, schedule)
    try:
        run.update(0)
        with pytest.raises(StreamError, match="segment 3 of columns 0 to 1, but next come segment 1"):
            run.engine.submit(stream_batch(0, 2, 3), 1)
        for update in range(1, 4):
            run.update(update)
        assert run.finish().losses == expected.losses
    finally:
        run.engine.close()
