"""The text that all contenders train on: its bytes, in rows, in an order that the seed decides."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import Dataset

from hf_ouroboros.data import default_corpus

from .contenders import ContenderError
from .job import Job
from .options import BenchmarkArguments

VALIDATION_SHARE = 0.1
VALIDATION_BATCHES = 4
"""Global batches of validation text."""


class Blocks(Dataset):
    """Rows of tokens as the Trainers take them.

    Args:
        tokens: [rows, time].
    """

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tokens[index].long()
        return {"input_ids": row, "labels": row}


def write_blocks(options: BenchmarkArguments, path: Path) -> None:
    """Writes {"train", "validation"}: bytes [rows, time], validation from other documents or the end of the file.

    Raises:
        ContenderError: the text is too short.
    """
    if options.train_file is None:
        enough = (options.most_updates + VALIDATION_BATCHES) * options.tokens_per_update
        corpus = default_corpus(max(400_000, 2 * enough), VALIDATION_SHARE)
        train, validation = ("\n".join(texts).encode() for texts in (corpus.train_texts, corpus.validation_texts))
    else:
        data = Path(options.train_file).read_bytes()
        cut = round(len(data) * (1 - VALIDATION_SHARE))
        train, validation = data[:cut], data[cut:]
    rows = _rows(train, options.block_size)
    held_out = _rows(validation, options.block_size)[: VALIDATION_BATCHES * options.global_batch]
    # Whole global batches, so that a mean over micro-batches is the mean over tokens for every contender.
    whole = len(held_out) // options.global_batch * options.global_batch
    if whole == 0 or len(rows) < options.global_batch:
        raise ContenderError(
            f"the text gives {len(rows)} rows for training and {len(held_out)} for validation, an update needs "
            f"{options.global_batch}; use a longer --train_file, or a smaller --batch_size or --block_size"
        )
    torch.save({"train": rows, "validation": held_out[:whole]}, path)


def _rows(data: bytes, length: int) -> torch.Tensor:
    usable = len(data) // length * length
    return torch.frombuffer(bytearray(data[:usable]), dtype=torch.uint8).view(-1, length)


def read_blocks(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Training rows in the order of this run, as many as its updates need, and validation rows: [rows, time] each."""
    blocks = torch.load(job.data, weights_only=True)
    needed = job.updates * job.options.global_batch
    order = torch.Generator().manual_seed(job.seed)
    rounds = [torch.randperm(len(blocks["train"]), generator=order) for _ in range(-(-needed // len(blocks["train"])))]
    return blocks["train"][torch.cat(rounds)[:needed]], blocks["validation"]
