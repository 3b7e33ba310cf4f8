"""On accelerators every schedule gives the reference's numbers, whatever the queues do at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import distance, run
from trainer_helpers import logged

TOLERANCE = 1e-5
"""Of a weight after ten micro-batches at a learning rate of 0.01, relative to the largest of its tensor, in float32."""


@pytest.mark.parametrize("model", ["gpt2", "llama", "llama-tied"])
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
def test_schedules_agree_with_the_reference(tmp_path: Path, model: str, schedule: str) -> None:
    expected = run(tmp_path / "reference", model, schedule="reference")
    found = run(tmp_path / schedule, model, schedule=schedule)
    assert distance(expected, found) <= TOLERANCE
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-4)
    assert logged(found, "grad_norm") == pytest.approx(logged(expected, "grad_norm"), rel=1e-3)


def test_without_delay_as_on_one_stage(tmp_path: Path) -> None:
    expected = run(tmp_path / "one", "llama", stages=1, max_grad_norm=0.0)
    found = run(tmp_path / "three", "llama", schedule="1f1b", max_grad_norm=0.0, dataloader_num_workers=0)
    assert [len(logged(t, "loss")) for t in (expected, found)] == [6, 6]


@pytest.mark.parametrize("model", ["gpt2", "llama-tied"])
def test_a_divided_backward_is_the_whole(tmp_path: Path, model: str) -> None:
    expected, found = (run(tmp_path / schedule, model, schedule=schedule) for schedule in ("1f1b", "zero_bubble"))
    assert distance(expected, found) <= TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"fp16": True},
        {"recompute": True},
        {"weights": "now"},
        {"num_stages": 4, "stages": 4, "delay_compensation": "weight_prediction"},
        {"delay_compensation": "muon+weight_prediction+error_feedback"},
        {"delay_warmup_steps": 2, "optim": "adamw_torch_fused"},
        {"stages": 2, "gradient_accumulation_steps": 3},
    ],
    ids=["bf16", "fp16", "recompute", "weights of now", "prediction", "muon", "warm-up", "two stages"],
)
def test_options_agree_with_the_reference(tmp_path: Path, options: dict[str, Any]) -> None:
    options = dict(options)
    stages = options.pop("stages", 3)
    expected = run(tmp_path / "reference", "llama-tied", stages, schedule="reference", **options)
    found = run(tmp_path / "pipelined", "llama-tied", stages, **options)
    assert distance(expected, found) <= (2e-2 if options.keys() & {"bf16", "fp16"} else 1e-4)


def test_pure_bfloat16(tmp_path: Path) -> None:
    from gpu_runs import tiny_llama

    expected = run(tmp_path / "reference", tiny_llama(tied=False).bfloat16(), schedule="reference")
    found = run(tmp_path / "pipelined", tiny_llama(tied=False).bfloat16())
    assert distance(expected, found) <= 2e-2


def test_two_runs_are_equal(tmp_path: Path) -> None:
    first, second = (run(tmp_path / name, "llama", bf16=True) for name in ("first", "second"))
    assert distance(first, second) == 0.0
    assert [
        {k: v for k, v in e.items() if "runtime" not in k and "second" not in k} for e in first.state.log_history
    ] == [{k: v for k, v in e.items() if "runtime" not in k and "second" not in k} for e in second.state.log_history]


@pytest.mark.parametrize("schedule", ["pipelined", "1f1b"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, schedule: str) -> None:
    options = {
        "schedule": schedule,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    whole = run(tmp_path / "whole", "llama-tied", **options)
    rest = run(tmp_path / "rest", "llama-tied", resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    assert distance(whole, rest) <= TOLERANCE
    assert logged(rest, "eval_loss")[-1] == pytest.approx(logged(whole, "eval_loss")[-1], rel=1e-5)


def test_model_is_whole_afterwards(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", "llama")
    trainer.model.eval()
    ids = torch.arange(12)[None].to(trainer.model.device)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids).logits
    assert logits.isfinite().all()
    trainer.save_model()
    again = type(trainer.model).from_pretrained(tmp_path / "run")
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids.cpu()).logits, logits.cpu(), atol=1e-4)
