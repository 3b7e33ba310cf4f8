"""A frozen tied matrix that two processes hold is saved once, and read by both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rig import in_processes
from trainer_helpers import differing, split_options, tiny_model, trained
from trainer_runs import held, whole
from transformers import AutoModelForCausalLM

RUN: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_stages": 2}


def model() -> Any:
    """Tied, with frozen embeddings."""
    made = tiny_model()
    made.transformer.wte.requires_grad_(False)
    return made


def train_part(rank: int, folder: str) -> list[dict[str, Any]]:
    trainer = trained(f"{folder}/run", {"model": model()}, **RUN)
    trainer.save_model(f"{folder}/saved")
    assert not trainer.model.transformer.wte.weight.is_meta
    again = trained(f"{folder}/again", {"model": model()}, resume=f"{folder}/run/checkpoint-2", **RUN)
    return [held(trainer), held(again)]


@pytest.mark.slow
def test_saved_once(tmp_path: Path) -> None:
    expected = trained(tmp_path / "here", {"model": model()}, schedule="reference", **{**RUN, **split_options(2, 2)})
    parts = in_processes(2, train_part, str(tmp_path))
    for found in (whole([{**part[i], "log": []} for part in parts]) for i in range(2)):
        assert differing(held(expected)["weights"], found["weights"]) == []
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert "transformer.wte.weight" in index["weight_map"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert differing(dict(expected.model.state_dict()), dict(loaded)) == []
    on = trained(
        tmp_path / "on", {"model": model()}, resume=tmp_path / "run" / "checkpoint-2", **{**RUN, **split_options(2, 2)}
    )
    assert differing(held(expected)["weights"], held(on)["weights"]) == []
