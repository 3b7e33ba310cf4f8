"""Streams for the tests of the trainer: rows that say where they stand, and runs that read them in order."""

from __future__ import annotations

from typing import Any

import torch
from stream_helpers import CUT, tiny_xl
from torch.utils.data import Dataset
from trainer_helpers import ouroboros

from hf_ouroboros import OuroborosTrainer

VOCABULARY = 19
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "train_sampling_strategy": "sequential",
    "dataloader_drop_last": True,
}


class StreamRows(Dataset):
    """Segments of random columns, all columns of a segment before the next one.

    Args:
        columns: how many.
        segments: of each.
        tail: tokens of the last segment.
    """

    def __init__(self, columns: int = 4, segments: int = 6, seed: int = 0, tail: int = 5, time: int = 5):
        length = (segments - 1) * time + tail + 1
        self.ids = torch.randint(VOCABULARY, (columns, length), generator=torch.Generator().manual_seed(seed))
        self.columns, self.segments, self.time = columns, segments, time

    def __len__(self) -> int:
        return self.columns * self.segments

    def __getitem__(self, index: int) -> dict[str, Any]:
        segment, column = divmod(index, self.columns)
        window = self.ids[column, segment * self.time : (segment + 1) * self.time + 1]
        return {
            "input_ids": window[:-1],
            "labels": window[:-1],
            "shift_labels": window[1:],
            "stream_columns": column,
            "stream_segments": segment,
        }


def stream_trainer(output_dir: Any, trainer: dict[str, Any] | None = None, **options: Any) -> OuroborosTrainer:
    """A trainer on a small Transformer-XL with several tied matrices and 2 epochs of 6 updates."""
    given = {"train_dataset": StreamRows(), "eval_dataset": StreamRows(seed=1, segments=4, tail=3)} | (trainer or {})
    if "model" not in given:
        given["model"] = tiny_xl(dropout=0.1, same_length=True, **CUT)
    return ouroboros(output_dir, given, **(OPTIONS | options))


def trained_on_stream(output_dir: Any, resume: Any = None, **options: Any) -> OuroborosTrainer:
    """`stream_trainer`, after its `train()`."""
    made = stream_trainer(output_dir, **options)
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return made
