"""Processes of a replica that got different batches say so before anything is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rig import in_processes
from trainer_helpers import Rows, ouroboros
from trainer_runs import Stream

from hf_ouroboros import DisagreementError
from hf_ouroboros.processes.reports import fingerprint
from hf_ouroboros.processes.same_batches import structure

# what is different about a row, and what the error says of it
CHANGES: dict[str, tuple[Any, str]] = {
    "shape": (lambda row: {k: v[:7] for k, v in row.items()}, "input_ids of micro-batch 0 is"),
    "type": (lambda row: {**row, "input_ids": row["input_ids"].int()}, "input_ids of micro-batch 0 is"),
    "keys": (lambda row: {k: row[k] for k in ("input_ids", "labels")}, "attention_mask of micro-batch 0 is"),
    "labels": (lambda row: {**row, "labels": row["labels"].roll(1)}, "labels of micro-batch 0 is"),
    "mask": (lambda row: {**row, "attention_mask": 1 - row["attention_mask"]}, "attention_mask of micro-batch 0 is"),
}


class Odd(Rows):
    """All rows are different in one way in the odd process."""

    def __init__(self, change: str, odd: bool):
        super().__init__(18)
        self._change = CHANGES[change][0] if odd else lambda row: row

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._change(super().__getitem__(index))


OPTIONS = {"num_stages": 3, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}


def different(rank: int, folder: str, calls: list[tuple[str, str]], odd: int, options: dict[str, Any]) -> list[Any]:
    found = []
    for change, call in calls:
        own = rank == odd
        rows = Stream(7 if own else 10) if change == "end" else Odd(change, own)
        given = {"train_dataset": rows, "eval_dataset": rows}
        trainer = ouroboros(folder, given, **OPTIONS, **options, max_steps=20)
        with pytest.raises(DisagreementError) as caught:
            getattr(trainer, call)()
        assert trainer.state.global_step == (3 if change == "end" else 0)
        found.append(str(caught.value))
    return found


def check(folder: Path, calls: list[tuple[str, str]], world: int, odd: int, **options: Any) -> None:
    every = in_processes(world, different, str(folder), calls, odd, options)
    assert all(texts == every[0] for texts in every)
    for (change, call), text in zip(calls, every[0], strict=True):
        assert f"the micro-batches of {'evaluation' if call == 'evaluate' else 'update'}" in text
        assert CHANGES.get(change, (None, "number of micro-batches is"))[1] in text and f"on rank {odd}" in text


@pytest.mark.slow
def test_named_by_both_before_the_first_update(tmp_path: Path) -> None:
    calls = [("shape", "train"), ("shape", "evaluate"), ("type", "train"), ("keys", "train"), ("labels", "train")]
    check(tmp_path, [*calls, ("mask", "evaluate"), ("end", "train")], 2, 1)


@pytest.mark.slow
def test_named_by_all_replicas(tmp_path: Path) -> None:
    check(tmp_path, [("shape", "train"), ("labels", "evaluate")], 4, 0, data_parallel_replicas=2)


def test_structure() -> None:
    batch = {"b": torch.zeros(2, 3), "a": torch.ones(1, dtype=torch.bool), "c": ["text"]}
    found = structure([batch, ()])
    assert found["number of micro-batches"] == 2 and found["c of micro-batch 0"] == "list"
    assert found["micro-batch 1"] == "tuple" and "[2, 3] torch.float32, checksum" in found["b of micro-batch 0"]
    assert structure([dict(reversed(batch.items())), ()]) == found


@pytest.mark.parametrize("key", ["input_ids", "labels", "weights", "scalar"])
def test_fingerprint_covers_all_tensors(key: str) -> None:
    batch = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "labels": torch.ones(2, 3, dtype=torch.long).T,
        "weights": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.0),
        "texts": ["a", "b"],
    }
    assert fingerprint(batch) == fingerprint(dict(reversed(batch.items())))
    assert fingerprint(batch) != fingerprint({**batch, key: batch[key] * 2})
    assert fingerprint(batch, 1) != fingerprint(batch, 2)
