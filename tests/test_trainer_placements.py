"""Stages anywhere through the Trainer: any map, and `device_map="mixed"`, with the reference's numbers, a reason, and the same split again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer_helpers import assert_same, differing, ouroboros, trained
from trainer_runs import run_all, run_here
from transformers import GPT2Config, GPT2LMHeadModel

MIXED = {"device_map": "mixed", "num_stages": 5, "devices": ["cpu:0", "cpu:1"]}
ANY = {
    **{f"transformer.{name}": 0 for name in ("wte", "wpe", "drop", "h.1", "h.3", "ln_f")},
    **{f"transformer.h.{i}": 1 for i in (0, 2, 4)},
    "lm_head": 0,
}


def test_a_map_with_several_runs_per_device(tmp_path: Path) -> None:
    """Without `num_stages`, from a file as `plan` writes it."""
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(ANY))
    expected = trained(tmp_path / "r", schedule="reference", device_map=ANY, devices=["cpu:0", "cpu:1"])
    found = trained(tmp_path / "p", device_map=str(file), devices=["cpu:0", "cpu:1"])
    assert found.stage_plan.placement == (0, 1, 0, 1, 0, 1, 0)
    assert_same(expected, found)


@pytest.mark.slow
def test_mixed_is_the_same_split_again(tmp_path: Path) -> None:
    whole = trained(tmp_path / "r", schedule="reference", **MIXED)
    saving = {"save_strategy": "steps", "save_steps": 2}
    begun = trained(tmp_path / "p", schedule="zero_bubble", max_steps=2, **saving, **MIXED)
    assert begun.stage_plan.placement == (0, 1, 0, 1, 0)
    trained(tmp_path / "s", **saving, **MIXED)
    resumed = trained(tmp_path / "s", resume=tmp_path / "s" / "checkpoint-2", **saving, **MIXED)
    assert resumed.stage_plan == ouroboros(tmp_path / "n", **MIXED).stage_plan
    assert_same(whole, resumed)


def test_the_reason_is_told(tmp_path: Path) -> None:
    trainer = ouroboros(tmp_path, **MIXED)
    reason = trainer.stage_plan.reason
    assert reason.startswith("mixed: the busiest device has 1.") and str(trainer.stage_plan).endswith(f"\n{reason}")
    trainer.create_model_card()
    assert f"| Split | {reason} |" in (tmp_path / "README.md").read_text()
    plain = ouroboros(tmp_path / "auto", devices=["cpu:0", "cpu:1"])
    assert plain.stage_plan.reason == ""
    plain.create_model_card()
    assert "| Split |" not in (tmp_path / "auto" / "README.md").read_text()


def heavy_head() -> GPT2LMHeadModel:
    """A head that is as much work as all four layers."""
    config = GPT2Config(vocab_size=768, n_embd=16, n_layer=4, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def test_the_head_may_have_a_device_of_its_own(tmp_path: Path) -> None:
    trainer = ouroboros(tmp_path, {"model": heavy_head()}, device_map="mixed", devices=["cpu:0", "cpu:1"])
    assert [(row.layers, row.device) for row in trainer.stage_plan.rows] == [(0, "cpu:0"), (4, "cpu:1"), (0, "cpu:0")]
    contiguous = ouroboros(tmp_path, {"model": heavy_head()}, devices=["cpu:0", "cpu:1"])
    assert [row.layers for row in contiguous.stage_plan.rows] == [1, 3, 0]


@pytest.mark.slow
def test_several_stages_per_process(tmp_path: Path) -> None:
    """Training, and evaluation, whose batches pass through every process more than once."""
    evaluated: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    options = {"device_map": "mixed", "num_stages": 5, **evaluated}
    (found,) = run_all(tmp_path, 2, [{"options": options, "name": "processes"}])
    here = {"options": {**MIXED, **evaluated, "schedule": "reference"}, "name": "reference"}
    expected = run_here(tmp_path, here)
    assert differing(expected["weights"], found["weights"]) == []
    assert found["log"] == expected["log"]
