"""The scale of losses in float16: its rule is GradScaler's, late; the engine equals the reference, whatever overflows."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import Case, Run, assert_same_run, causal_loss, count_targets, differences, make_optimizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainer_helpers import EVERY

from hf_ouroboros.engine.loss_scale import LARGEST, LossScale, ScaleState
from hf_ouroboros.engine.settings import EngineSettings
from hf_ouroboros.engine.state import RunState
from hf_ouroboros.errors import CheckpointError

SCHEDULES = ["pipelined", "lockstep", "1f1b", "zero_bubble"]
LOOKS = ["synchronize", "settle", "norm", "state"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ---- the rule ----


@pytest.mark.parametrize("seed", range(4))
def test_without_delays_it_is_grad_scaler(seed: int) -> None:
    overflows = (torch.rand(60, generator=torch.Generator().manual_seed(seed)) < 0.15 * seed).tolist()
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    stock = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    stock.scale(torch.zeros(()))  # makes its tensors
    ours = EngineSettings("1f1b", initial_loss_scale=2.0**20, loss_scale_interval=3).loss_scale(3)
    assert ours is not None
    for update, overflow in enumerate(overflows):
        assert ours.open(update) == stock.get_scale()
        parameter.grad = torch.tensor([1.0, float("inf") if overflow else 1.0])
        stock.step(optimizer)
        stock.update()
        ours.hear(update, overflow)


def scales(scale: LossScale, overflows: str, first: int = 0) -> list[float]:
    """Of updates of which it hears at once that they have overflowed ("x") or have not ("."), which it may not use too early."""
    found = []
    for update, overflow in enumerate(overflows, first):
        found.append(scale.open(update))
        assert scale.hear(update, overflow == "x") == found[-1]
    return found


def delayed(**given: Any) -> LossScale:
    scale = EngineSettings("pipelined", micro_batches=4, initial_loss_scale=8.0, **given).loss_scale(3)
    assert scale is not None
    return scale


def test_with_delays_it_is_late_and_halves_once() -> None:
    """The table of the module."""
    assert delayed().needed(5) == 1
    assert scales(delayed(), "xxxxxx.......") == [8.0] * 5 + [4.0] * 8
    assert scales(delayed(), "xxxxxxxxxxxxx") == [8.0] * 5 + [4.0] * 6 + [2.0] * 2
    assert scales(delayed(), ".....x...........") == [8.0] * 10 + [4.0] * 7


def test_it_grows_after_so_many_good_updates() -> None:
    found = scales(delayed(loss_scale_interval=2), "." * 20)
    assert found == [8.0] * 6 + [16.0] * 7 + [32.0] * 7
    scale = LossScale(LARGEST, 1, 1, 0)
    assert scales(scale, "...") == [LARGEST] * 3


def test_its_state_is_all_of_it() -> None:
    whole = delayed(loss_scale_interval=3)
    overflows = "xx..x......x..........x......"
    expected = scales(whole, overflows)
    for at in range(1, len(overflows)):
        first, second = (delayed(loss_scale_interval=3) for _ in range(2))
        scales(first, overflows[:at])
        second.resume(at, ScaleState.read(json.loads(json.dumps(asdict(first.state())))))
        assert scales(second, overflows[at:], at) == expected[at:]


def test_a_run_that_begins_with_another_one_s_weights() -> None:
    scale = delayed()
    scale.resume(30, None)
    assert scales(scale, "x.....", 30) == [8.0] * 5 + [4.0]


def test_a_damaged_state_is_refused() -> None:
    state = asdict(delayed().state())
    for damage in ({"good": -1}, {"scale": "8"}, {"overflowed": 3}, {"overflowed": ["a"]}, {"fence": 0.5}, {"more": 1}):
        meta = RunState(1, "joint", 0, 0, 0, None).meta() | {"loss_scale": state | damage}
        with pytest.raises(CheckpointError, match="loss_scale"):
            RunState.from_parts(meta, {})
    with pytest.raises(CheckpointError, match="loss_scale"):
        RunState.from_parts(meta | {"loss_scale": None}, {})


# ---- the engine ----


def scaled(stages: int = 3, updates: tuple[int, ...] = (2,) * 12, scale: float = 2.0**19, **given: Any) -> Case:
    """A run whose first scales are too large, and which tries larger ones every few updates."""
    return Case(stages, updates=updates, scale=scale, **{"interval": 2, **given})


def possible(case: Case) -> list[str]:
    """The schedules that can execute a case."""
    delayed = ["lockstep"] + ["pipelined"] * (case.scope == "stage" and case.tied_gradient == "joint")
    return delayed + ["1f1b", "zero_bubble"] * (case.tied_gradient == "joint")


def history(run: Run) -> list[tuple[float | None, bool]]:
    """Scale of each update, and whether anything has overflowed."""
    return [(norm.scale, norm.has_overflowed) for norm in run.engine.collect_norms()]


def assert_equal_to_reference(case: Case, schedule: str, looks: dict[int, str] | None = None) -> Run:
    rule = f"reference {schedule}" if schedule in ("1f1b", "zero_bubble") else "reference"
    expected, found = Run(case, rule).train(looks), Run(case, schedule).train(looks)
    assert_same_run(expected, found)
    assert history(expected) == (heard := history(found))
    found.heard = heard
    return found


CASES = [
    scaled(3, clip=0.2),
    scaled(4),
    scaled(3, dropout=0.2, padded=True, tied=False),
    scaled(4, (3, 1, 2, 3, 2, 1) * 2, optimizer="nadam", recompute=True, dropout=0.1),
    scaled(2, (1,) * 24, warmup=2),
    scaled(1),
    scaled(3, clip=0.3, scope="global"),
    scaled(4, tied_gradient="paper"),
    scaled(5, compensation="error_feedback+weight_prediction", devices=2),
    scaled(3, optimizer="muon", compensation="gap_aware"),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equal_to_the_reference(schedule: str) -> None:
    found = assert_equal_to_reference(CASES[0], schedule, {3: "settle", 6: "state", 8: "synchronize"})
    overflows = [overflow for _, overflow in found.heard]
    assert True in overflows and False in overflows
    found_scales = [scale for scale, _ in found.heard]
    assert min(found_scales) < found_scales[0], "it has fallen"


@pytest.mark.slow
@pytest.mark.parametrize("index", range(1, len(CASES)))
def test_other_cases(index: int) -> None:
    schedules = possible(CASES[index])
    for schedule in schedules if EVERY else [schedules[index % len(schedules)]]:
        assert_equal_to_reference(CASES[index], schedule)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return scaled(
        draw(st.integers(1, 5)),
        tuple(draw(st.lists(st.integers(1, 3), min_size=4, max_size=16))),
        scale=2.0 ** draw(st.sampled_from([17, 19, 21])),
        interval=draw(st.integers(1, 3)),
        tied=draw(st.booleans()),
        optimizer=draw(st.sampled_from(["sgd", "adamw", "adafactor"])),
        clip=draw(st.sampled_from([None, 0.3])),
        scope=draw(st.sampled_from(["stage", "global"])),
        warmup=draw(st.integers(0, 2)),
        recompute=draw(st.booleans()),
        padded=draw(st.booleans()),
        devices=draw(st.sampled_from([None, 1, 2, 3])),
    )


@pytest.mark.slow
@settings(max_examples=60 if EVERY else 6, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.dictionaries(st.integers(0, 9), st.sampled_from(LOOKS), max_size=3), st.data())
def test_any_run_looked_at_or_not(case: Case, looks: dict[int, str], data: st.DataObject) -> None:
    assert_equal_to_reference(case, data.draw(st.sampled_from(possible(case))), looks)


def test_it_falls_and_grows() -> None:
    found = Run(scaled(3, (1,) * 14), "1f1b").train()
    seen = [scale for scale, _ in history(found)]
    assert min(seen) < seen[0] and max(b - a for a, b in pairwise(seen)) > 0


@pytest.mark.parametrize(
    ("kind", "stepped"), [("reference", "some"), ("pipelined", "some"), ("reference 1f1b", "none"), ("1f1b", "none")]
)
def test_who_makes_no_step(kind: str, stepped: str) -> None:
    """With delays, the stage whose gradients are no numbers; the others make theirs. Without, nobody."""

    def spoil(model: torch.nn.Module) -> None:
        model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * float("nan"))

    run = Run(scaled(3, (4, 4), 8.0, tied=False, optimizer="plain sgd"), kind, prepare=spoil)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    spoiled = set(run.engine.partition.owned(0)) if stepped == "some" else set(before)
    run.train()
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == before.keys() - spoiled
    assert run.engine.step_was_skipped == (stepped == "none")


# ---- stock ----


@pytest.mark.parametrize("scope", ["none", "global"])
def test_without_delays_a_run_is_torchs(scope: str) -> None:
    """A loop with torch.amp.GradScaler on the whole model, to the last bit; the norm of several stages is summed otherwise."""
    clip = {} if scope == "none" else {"stages": 1, "clip": 0.4, "scope": "global"}
    case = scaled(**{"stages": 3, "tied": False, "padded": True, **clip})
    model = case.model()
    optimizer = make_optimizer(case.optimizer, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: 1 / (1 + 0.1 * u))
    scaler = torch.amp.GradScaler("cpu", init_scale=case.scale, growth_interval=case.interval)
    losses, expected = [], []
    for u in range(len(case.updates)):
        batches = case.batches(u)
        scale = scaler.get_scale() if u else case.scale
        for batch in batches:
            with torch.autocast("cpu", torch.float16):
                logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
                loss = causal_loss(logits, batch, count_targets(batches))
                losses.append(float(loss.detach()))
            scaler.scale(loss).backward()
        if scope == "global":
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        scaler.step(optimizer)
        scaler.update()
        expected.append((scale, scaler.get_scale() < scale))
        optimizer._opt_called = True
        scheduler.step()
        optimizer.zero_grad()
    found = Run(case, "1f1b").train()
    assert differences(model.state_dict(), found.model.state_dict()) == []
    assert differences(optimizer.state_dict()["state"], found.optimizer.state_dict()["state"]) == []
    assert losses == found.losses
    assert expected == history(found)


# ---- resuming ----


def begun(case: Case, schedule: str, at: int) -> tuple[Run, dict[str, Any]]:
    run = Run(case, schedule)
    try:
        for u in range(at):
            run.update(u)
        return run, run.checkpoint()
    finally:
        run.engine.close()


@pytest.mark.parametrize("at", [1, 4, 7, 8] if EVERY else [5])
def test_resumes_under_every_schedule(at: int) -> None:
    """In the middle of what was heard and not counted yet."""
    case = scaled(3, (2,) * 9, dropout=0.1)
    whole = Run(case, "reference").train()
    for first, second in [("pipelined", "reference"), ("reference", "lockstep"), ("lockstep", "pipelined")]:
        _, checkpoint = begun(case, first, at)
        resumed = Run(case, second).resume(checkpoint).train(updates=range(at, len(case.updates)))
        assert differences(whole.model.state_dict(), resumed.model.state_dict()) == []
        assert differences(whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]) == []


def test_checkpoints_are_the_same_under_every_schedule() -> None:
    found = [begun(scaled(3), schedule, 6)[1] for schedule in ("pipelined", "lockstep", "reference")]
    for other in found[1:]:
        assert differences(found[0], other) == []
    state = json.loads(found[0]["meta"])["loss_scale"]
    assert state["counted"] < 6 and state["overflowed"], "some is still to be counted"


def test_a_checkpoint_in_float32_begins_anew() -> None:
    case = scaled(2, (2,) * 4)
    _, checkpoint = begun(replace(case, scale=None), "pipelined", 2)
    found = [
        Run(case, schedule).resume(checkpoint).train(updates=range(2, 4)) for schedule in ("reference", "pipelined")
    ]
    assert differences(found[0].model.state_dict(), found[1].model.state_dict()) == []
    assert [scale for scale, _ in history(found[1])] == [case.scale] * 2
