"""TRL's DPOTrainer over two processes: the reference's weights, and the same metrics in both logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rig import in_processes
from sft_cases import options, preferences, tiny, tokenizer
from trainer_helpers import EVERY, differing, split_options
from trainer_runs import held, whole

from hf_ouroboros.trl import OuroborosDPOConfig, OuroborosDPOTrainer

ADAPTED = (False, True) if EVERY else (True,)
GIVEN = {"eval_strategy": "steps", "eval_steps": 2}


def run(folder: str, adapted: bool, **more: Any) -> OuroborosDPOTrainer:
    from peft import LoraConfig

    args = OuroborosDPOConfig(**options(folder, **GIVEN, **more))
    data: dict[str, Any] = {"train_dataset": preferences(), "eval_dataset": preferences(5, seed=1)}
    if adapted:
        data["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = OuroborosDPOTrainer(tiny(), args=args, processing_class=tokenizer(), **data)
    trainer.train()
    return trainer


def result(trainer: OuroborosDPOTrainer) -> dict[str, Any]:
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    return held(trainer) | {"reference": [torch.tensor(trainer.train_dataset[column]) for column in columns]}


def train_part(rank: int, folder: str) -> list[dict[str, Any]]:
    return [result(run(f"{folder}/{adapted}", adapted, num_stages=2)) for adapted in ADAPTED]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    parts = in_processes(2, train_part, str(tmp_path / "there"), limit=300)
    for index, adapted in enumerate(ADAPTED):
        trainer = run(str(tmp_path / "here"), adapted, schedule="reference", **split_options(2, 2))
        expected = result(trainer)
        found = whole([part[index] for part in parts])  # with equal logs
        assert differing(expected["weights"], found["weights"]) == []
        for part in parts:
            assert differing(expected["reference"], part[index]["reference"]) == []
        assert len(found["log"]) == 3 + 2 + 1  # Trainer evaluates at the end, too
        for there, here in zip(found["log"], expected["log"], strict=True):
            assert there == pytest.approx(here, rel=1e-5, abs=1e-7)
