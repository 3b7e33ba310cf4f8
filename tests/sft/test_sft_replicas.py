"""TRL's trainers with two data-parallel replicas: weights and logs of one replica with twice the batch, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rig import in_processes
from sft_cases import options, preferences, rows, tiny, tokenizer
from trainer_helpers import split_options
from trainer_runs import held, whole

from hf_ouroboros import UnsupportedOptionError
from hf_ouroboros.trl import OuroborosDPOConfig, OuroborosDPOTrainer, OuroborosSFTConfig, OuroborosSFTTrainer

# The last batch of an evaluation has three rows, or one: the second replica then gets one of its own and a repetition, or none.
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "optim": "sgd", "num_train_epochs": 2}
SFT: dict[str, Any] = {"assistant_only_loss": True, "learning_rate": 0.5}
DPO: dict[str, Any] = {"learning_rate": 0.5, "beta": 0.5}


def sft(folder: str, size: int, evaluated: int | None = None, **more: Any) -> OuroborosSFTTrainer:
    sizes = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size}
    args = OuroborosSFTConfig(**options(folder, **{**EVALUATED, **SFT, **sizes, **more}))
    counts = {"seven": 7, "five": 5} if evaluated is None else {"some": evaluated}
    data = {"train_dataset": rows("chat"), "eval_dataset": {n: rows("chat", c, seed=1) for n, c in counts.items()}}
    return OuroborosSFTTrainer(tiny(), args, processing_class=tokenizer(), **data)


def dpo(folder: str, size: int, **more: Any) -> OuroborosDPOTrainer:
    sizes = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size}
    args = OuroborosDPOConfig(**options(folder, **{**EVALUATED, **DPO, **sizes, **more}))
    data = {"train_dataset": preferences(), "eval_dataset": {str(c): preferences(c, seed=1) for c in (7, 5)}}
    return OuroborosDPOTrainer(tiny(), args=args, processing_class=tokenizer(), **data)


def train_part(rank: int, folder: str) -> list[dict[str, Any]]:
    two = {"num_stages": 2, "data_parallel_replicas": 2}
    runs: list[Any] = [sft(f"{folder}/sft", 2, **two), dpo(f"{folder}/dpo", 2, **two)]
    for run in runs:
        run.train()
    flat = {"assistant_only_loss": False, "padding_free": True, "max_length": None, **two}
    with pytest.raises(UnsupportedOptionError, match="an evaluation of 7 rows by 2 replicas, .* and padding_free"):
        sft(f"{folder}/refused", 2, **flat)
    trainer = sft(f"{folder}/flat", 2, evaluated=8, **flat)
    loss = trainer.evaluate()["eval_some_loss"]
    with pytest.raises(UnsupportedOptionError, match="choose a batch size so that 2 x per_device_eval_batch_size"):
        trainer.evaluate(rows("chat", 6, seed=1))
    return [held(runs[0]), held(runs[1]) | {"reference": reference_of(runs[1])}, {"loss": loss}]


def reference_of(trainer: OuroborosDPOTrainer) -> list[torch.Tensor]:
    return [torch.tensor(trainer.train_dataset[f"ref_{name}_logps"]) for name in ("chosen", "rejected")]


@pytest.mark.slow
def test_two_replicas_of_two_devices(tmp_path: Path) -> None:
    parts = in_processes(4, train_part, str(tmp_path / "there"), limit=300)
    one = {"schedule": "reference", **split_options(2, 2)}
    runs: list[Any] = [sft(str(tmp_path / "sft"), 4, **one), dpo(str(tmp_path / "dpo"), 4, **one)]
    for index, run in enumerate(runs):
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train()
        expected, found = held(run), whole([part[index] for part in parts])  # with equal logs in all processes
        assert max(float((p - before[n]).abs().max()) for n, p in run.model.named_parameters()) > 0.01
        # The replicas' halves are summed in another order than the rows of one batch.
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-3, atol=1e-5)
        assert len(found["log"]) == len(expected["log"]) == 3 + 4 + 1
        for there, here in zip(found["log"], expected["log"], strict=True):
            assert there.keys() == here.keys()
            for name in there.keys() - {"total_flos"}:  # rows are padded to other lengths
                assert there[name] == pytest.approx(here[name], rel=1e-3, abs=1e-5), name
    for part in parts:
        torch.testing.assert_close(part[1]["reference"], reference_of(runs[1]))
    flat = sft(
        str(tmp_path / "flat"), 4, evaluated=8, **one, assistant_only_loss=False, padding_free=True, max_length=None
    )
    loss = flat.evaluate()["eval_some_loss"]
    assert [part[2]["loss"] for part in parts] == pytest.approx([loss] * 4, rel=1e-5)
