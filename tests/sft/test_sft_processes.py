"""TRL's SFTTrainer over two processes: the reference's weights, and the same metrics in both logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rig import in_processes
from sft_cases import options, rows, tiny, tokenizer
from trainer_helpers import differing, split_options
from trainer_runs import held, whole

from hf_ouroboros.trl import OuroborosSFTConfig, OuroborosSFTTrainer

GIVEN = {"eval_strategy": "steps", "eval_steps": 2, "assistant_only_loss": True}


def run(folder: str, **more: Any) -> OuroborosSFTTrainer:
    args = OuroborosSFTConfig(**options(folder, **GIVEN, **more))
    data = {"train_dataset": rows("chat"), "eval_dataset": rows("chat", 5, seed=1)}
    trainer = OuroborosSFTTrainer(tiny(), args, processing_class=tokenizer(), **data)
    trainer.train()
    return trainer


def train_part(rank: int, folder: str) -> dict[str, Any]:
    return held(run(folder, num_stages=2))


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    expected = run(str(tmp_path / "here"), schedule="reference", **split_options(2, 2))
    found = whole(in_processes(2, train_part, str(tmp_path / "there")))  # with equal logs
    assert differing(held(expected)["weights"], found["weights"]) == []
    assert len(found["log"]) == 3 + 2 + 1  # Trainer evaluates at the end, too
    for there, here in zip(found["log"], held(expected)["log"], strict=True):
        assert there == pytest.approx(here, rel=1e-5)
