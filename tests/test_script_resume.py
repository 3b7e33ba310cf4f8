"""Resuming on data whose epochs are not of a known length or order: as if nothing had happened, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset, IterableDataset
from trainer_helpers import Rows, assert_same, outcome, split_options, trained

from hf_ouroboros import CheckpointMismatchError


class Short(IterableDataset):
    """Rows without a length, other ones in every epoch."""

    epoch = 0

    def __init__(self, count: int = 18):
        self.count = count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(Rows(self.count, seed=self.epoch))


class Uneven(Dataset):
    """Rows of many lengths."""

    def __len__(self) -> int:
        return 18

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = Rows(18).ids[index][: 4 + index % 5]
        return {"input_ids": ids, "labels": ids}


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from torch.nn.utils.rnn import pad_sequence

    return {
        "input_ids": pad_sequence([r["input_ids"] for r in rows], batch_first=True),
        "labels": pad_sequence([r["labels"] for r in rows], batch_first=True, padding_value=-100),
    }


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["pipelined", "1f1b"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_data_without_a_length(tmp_path: Path, schedule: str, micro_batches: int) -> None:
    options = {
        "schedule": schedule,
        "gradient_accumulation_steps": micro_batches,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 1,
        **split_options(3, 2),
    }
    whole = outcome(trained(tmp_path, {"train_dataset": Short()}, **options))
    options |= {"save_strategy": "no"}
    for step in (2, 3, 5, 7) if schedule == "pipelined" else (4,):
        if micro_batches == 2 and not (tmp_path / f"checkpoint-{step}").exists():
            continue
        resumed = trained(tmp_path, {"train_dataset": Short()}, resume=tmp_path / f"checkpoint-{step}", **options)
        assert_same(whole, resumed)


@pytest.mark.slow
def test_grouped_by_length(tmp_path: Path) -> None:
    options = {
        "train_sampling_strategy": "group_by_length",
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        **split_options(3, 2),
    }
    given = {"train_dataset": Uneven(), "data_collator": padded}
    whole = outcome(trained(tmp_path, dict(given), **options))
    options |= {"save_strategy": "no"}
    for step in (2, 5):  # in the first epoch, and at its end
        assert_same(whole, trained(tmp_path, dict(given), resume=tmp_path / f"checkpoint-{step}", **options))
    with pytest.raises(CheckpointMismatchError, match="middle of epoch 2.*group_by_length"):
        trained(tmp_path, dict(given), resume=tmp_path / "checkpoint-7", **options)
    trained(tmp_path, dict(given), resume=tmp_path / "checkpoint-7", **options, ignore_data_skip=True)
