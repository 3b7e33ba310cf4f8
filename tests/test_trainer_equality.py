"""Through the Trainer, every schedule gives the reference's numbers, and K = 1 those of the stock Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainer_helpers import (
    AtStep,
    Rows,
    assert_same,
    common_options,
    differing,
    logged,
    ouroboros,
    outcome,
    split_options,
    stock,
    tiny_model,
    trained,
)

import hf_ouroboros.hooks.logs
from hf_ouroboros import OuroborosTrainer
from hf_ouroboros.ledger import LossLedger


class Hearing(LossLedger):
    """Remembers every loss that comes back."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.heard: list[tuple[int, float]] = []

    def add_loss(self, tick: int, loss: float) -> None:
        self.heard.append((tick, loss))
        super().add_loss(tick, loss)


@pytest.fixture(autouse=True)
def _hear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_ouroboros.hooks.logs, "LossLedger", Hearing)


def assert_schedules_agree(
    folder: Path,
    *schedules: str,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> OuroborosTrainer:
    """Runs the reference and the others; returns the reference's trainer."""
    run = [
        trained(folder / name, {"model": tiny_model(**(model or {}))}, schedule=name, **options)
        for name in ("reference", *schedules)
    ]
    expected = run[0]
    ticks = list(range(len(expected._ledger.heard)))
    assert [tick for tick, _ in expected._ledger.heard] == ticks
    for found in run[1:]:
        assert_same(expected, found)
        assert found._ledger.heard == expected._ledger.heard
        # Micro-batches come back in other portions, so that float32 sums round differently.
        assert found.state.log_history[-1]["train_loss"] == pytest.approx(
            expected.state.log_history[-1]["train_loss"], rel=1e-6
        )
        assert logged(found, "learning_rate") == logged(expected, "learning_rate")
        assert logged(found, "grad_norm")[-1] == logged(expected, "grad_norm")[-1]
    return expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "devices", "accumulation"),
    [(1, 1, 2), (2, 2, 1), (3, 2, 1), (3, 2, 2), (3, 2, 4), (4, 3, 2), (5, 4, 1), (5, 4, 4)],
)
def test_schedules_agree(tmp_path: Path, stages: int, devices: int, accumulation: int) -> None:
    """5 micro-batches an epoch: with 2 or 4 per update the last update of an epoch is ragged."""
    options = split_options(stages, devices) | {"gradient_accumulation_steps": accumulation}
    schedules = ["pipelined", "lockstep"] if accumulation == 2 else ["pipelined"]
    assert_schedules_agree(tmp_path, *schedules, **options)


CASES: dict[str, dict[str, Any]] = {
    "untied": {"model": {"tied": False}, **split_options(3, 3)},
    "two devices for five stages": split_options(5, 2),
    "layer counts": {"device_map": [1, 3, 1]},
    "no clipping": {"max_grad_norm": 0.0},
    "tight clipping": {"max_grad_norm": 0.05},
    "delay warm-up": {"delay_warmup_steps": 3},
    "delay warm-up past an epoch": {"delay_warmup_steps": 3, "gradient_accumulation_steps": 4, "num_train_epochs": 4},
    "recompute": {"recompute": True},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "fused adamw": {"optim": "adamw_torch_fused", "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor"},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "constant with warm-up": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
    "plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
        "learning_rate": 0.3,
    },
    "label smoothing": {"label_smoothing_factor": 0.2},
    "bfloat16": {"bf16": True},
    "longer than a run": {"gradient_accumulation_steps": 8, "max_steps": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_schedules_agree_with_options(tmp_path: Path, case: str) -> None:
    options = dict(CASES[case])
    schedules = ["lockstep"] if case in ("recompute", "delay warm-up") else []
    expected = assert_schedules_agree(tmp_path, "pipelined", *schedules, **options)
    if case == "plateau":
        assert min(logged(expected, "learning_rate")) < 0.3, "the plateau was to be met"


@pytest.mark.slow
def test_lockstep_agrees_with_global_clipping(tmp_path: Path) -> None:
    options = {"clip_scope": "global", "max_grad_norm": 0.1}
    assert_schedules_agree(tmp_path, "lockstep", **options)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_lockstep_agrees_with_the_papers_tied_gradient(tmp_path: Path, accumulation: int) -> None:
    expected = assert_schedules_agree(
        tmp_path, "lockstep", tied_gradient="paper", gradient_accumulation_steps=accumulation
    )
    joint = trained(tmp_path / "joint", schedule="reference", gradient_accumulation_steps=accumulation)
    assert differing(outcome(expected)["weights"], outcome(joint)["weights"]), "the two rules differ"


@pytest.mark.slow
def test_frozen_layers(tmp_path: Path) -> None:
    """A stage without anything to train passes hidden states on and gets no gradients."""

    def run(schedule: str) -> OuroborosTrainer:
        model = tiny_model()
        model.transformer.wte.requires_grad_(False)
        model.transformer.wpe.requires_grad_(False)
        for block in model.transformer.h[:3]:
            block.requires_grad_(False)
        return trained(tmp_path / schedule, {"model": model}, schedule=schedule, device_map=[2, 2, 1])

    expected = run("reference")
    for schedule in ("pipelined", "lockstep"):
        assert_same(expected, run(schedule))
    assert torch.equal(expected.model.transformer.wte.weight, tiny_model().transformer.wte.weight)


@pytest.mark.slow
def test_logged_losses_are_exact_where_the_pipeline_is_synchronized(tmp_path: Path) -> None:
    """Evaluation after every update: no loss is late, so each log entry is the reference's."""
    options = {"eval_strategy": "steps", "eval_steps": 1}
    expected, found = (trained(tmp_path / name, schedule=name, **options) for name in ("reference", "pipelined"))
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        assert logged(found, key) == logged(expected, key)
        assert len(logged(found, key)) == expected.state.max_steps


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 3])
def test_log_entries_come_when_they_are_due(tmp_path: Path, interval: int) -> None:
    """A loss may be late, an entry is not; the last one holds what is left."""
    found = trained(tmp_path, schedule="pipelined", logging_steps=interval, gradient_accumulation_steps=1)
    expected = [step for step in range(1, 11) if step % interval == 0]
    assert [entry["step"] for entry in found.state.log_history if "learning_rate" in entry] == expected
    assert len(found._ledger.heard) == 10


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_schedules_agree_on_anything(tmp_path: Path, data: st.DataObject) -> None:
    tied = data.draw(st.booleans(), "tied")
    stages = data.draw(st.integers(1, 5), "stages")
    options = split_options(stages, data.draw(st.integers(1, stages), "devices")) | {
        "gradient_accumulation_steps": data.draw(st.integers(1, 5), "accumulation"),
        "per_device_train_batch_size": data.draw(st.integers(1, 6), "batch"),
        "max_grad_norm": data.draw(st.sampled_from([0.0, 0.1, 1.0]), "max_grad_norm"),
        "delay_warmup_steps": data.draw(st.integers(0, 4), "warm-up"),
        "recompute": data.draw(st.booleans(), "recompute"),
        "optim": data.draw(st.sampled_from(["sgd", "adamw_torch", "adamw_torch_fused"]), "optim"),
        "eval_strategy": data.draw(st.sampled_from(["no", "epoch"]), "eval_strategy"),
        "max_steps": data.draw(st.integers(1, 9), "max_steps"),
        "learning_rate": 1e-3,
    }
    other = data.draw(st.sampled_from(["pipelined", "lockstep"]), "schedule")
    assert_schedules_agree(tmp_path, other, model={"tied": tied}, **options)


# ---- against the stock Trainer ----

STOCK_CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "no clipping": {"max_grad_norm": 0.0},
    "tight clipping": {"max_grad_norm": 0.05},
    "one micro-batch": {"gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "case"),
    [("pipelined", "default"), ("pipelined", "tight clipping"), ("lockstep", "default"), ("1f1b", "default")],
)
def test_one_stage_is_the_stock_trainer(tmp_path: Path, schedule: str, case: str) -> None:
    expected = stock(tmp_path / "stock", **STOCK_CASES[case])
    expected.train()
    options = STOCK_CASES[case] | split_options(1, 1)
    found = trained(tmp_path / "found", {"model": tiny_model(dropout=0.0)}, schedule=schedule, **options)
    assert_same(expected, found)


@pytest.mark.slow
@pytest.mark.parametrize("case", STOCK_CASES)
def test_one_stage_logs_what_the_stock_trainer_logs(tmp_path: Path, case: str) -> None:
    expected = stock(tmp_path / "stock", **STOCK_CASES[case])
    expected.train()
    options = STOCK_CASES[case] | split_options(1, 1) | {"schedule": "reference"}
    found = trained(tmp_path / "found", {"model": tiny_model(dropout=0.0)}, **options)
    assert_same(expected, found)
    assert found.state.max_steps == expected.state.max_steps
    assert found.state.total_flos == expected.state.total_flos
    assert logged(found, "learning_rate") == logged(expected, "learning_rate")
    # Same micro-batch losses, but Trainer adds them up in float32.
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-6)
    assert logged(found, "train_loss") == pytest.approx(logged(expected, "train_loss"), rel=1e-6)
    if case != "no clipping":
        # The norm of the whole is put together in float64.
        assert logged(found, "grad_norm") == pytest.approx(logged(expected, "grad_norm"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("1f1b", {"clip_scope": "global"}),
        ("1f1b", {"max_grad_norm": 0.0}),
        ("zero_bubble", {"clip_scope": "global"}),
        ("delay warm-up", {"clip_scope": "global"}),
    ],
)
def test_synchronous_schedules_are_the_stock_trainer(tmp_path: Path, schedule: str, options: dict) -> None:
    if schedule == "delay warm-up":
        options = options | {"delay_warmup_steps": 1000, "schedule": "lockstep"}
    else:
        options = options | {"schedule": schedule}
    stock_options = {k: v for k, v in options.items() if k == "max_grad_norm"} | {"optim": "sgd", "learning_rate": 0.3}
    expected = stock(tmp_path / "stock", **stock_options)
    expected.train()
    found = trained(tmp_path / "found", {"model": tiny_model(dropout=0.0)}, **(options | stock_options))
    # Both sides of the tied matrix, and the stages' norms, are added up in another order.
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert logged(found, "train_loss") == pytest.approx(logged(expected, "train_loss"), rel=1e-5)


# ---- looking ----


@pytest.mark.slow
def test_looking_does_not_change_a_run(tmp_path: Path) -> None:
    """Evaluation, logging, saving, synchronize() and reading weights after every step against none of it."""
    silent = trained(tmp_path / "silent", logging_strategy="no")
    busy = ouroboros(
        tmp_path / "busy", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2, eval_on_start=True
    )
    busy.add_callback(AtStep(None, lambda: (busy.synchronize(), busy.predict(Rows(3)))))
    busy.add_callback(AtStep(3, lambda: busy.save_model(str(tmp_path / "copy"))))
    busy.train()
    assert_same(silent, busy)


def test_synchronize_shows_the_weights_of_that_step(tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {}
    for schedule in ("reference", "pipelined"):
        trainer = ouroboros(tmp_path / schedule, schedule=schedule)
        weights = seen.setdefault(schedule, [])

        def look(trainer: OuroborosTrainer = trainer, weights: list[Any] = weights) -> None:
            trainer.synchronize()
            weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})

        trainer.add_callback(AtStep(None, look))
        trainer.train()
    assert len(seen["reference"]) == 6
    assert differing(seen["reference"], seen["pipelined"]) == []


def test_a_plain_synchronize_is_allowed_at_any_time(tmp_path: Path) -> None:
    trainer = ouroboros(tmp_path)
    trainer.synchronize()
    trainer.train()
    trainer.synchronize()
    assert common_options(tmp_path)["seed"] == trainer.args.seed
