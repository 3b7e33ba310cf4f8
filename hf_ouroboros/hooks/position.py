"""Where in its data a resumed run goes on: found, or refused where only the uninterrupted run knows it."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from ..errors import CheckpointMismatchError


def position(state: dict[str, Any], args: TrainingArguments, data: Any, counted: tuple[int, int]) -> tuple[int, int]:
    """Complete epochs before the checkpoint, and micro-batches of the next one before it.

    Args:
        state: Trainer's state in the checkpoint.
        args: of this run.
        data: what it trains on.
        counted: what Trainer has counted, from the length of an epoch. Of data without a length it takes the whole run to be
            one epoch, although its own count of epochs, in the state, goes on with each pass over the data.

    Raises:
        CheckpointMismatchError: the order of the data was drawn within the run, from random numbers that are gone.
    """
    if args.ignore_data_skip:
        return counted
    epochs, micro_batches = counted
    if not has_length(data):
        if not isinstance(state.get("epoch"), (int, float)) or not state.get("max_steps"):
            return counted
        epochs = math.floor(state["epoch"])
        share = state["epoch"] - epochs
        return epochs, round(share * state["max_steps"] * args.gradient_accumulation_steps)
    grouped = getattr(args, "train_sampling_strategy", None) == "group_by_length"
    if (grouped or getattr(args, "group_by_length", False)) and epochs and micro_batches:
        raise CheckpointMismatchError(
            f"the checkpoint is of the middle of epoch {epochs + 1}, and train_sampling_strategy='group_by_length' has drawn "
            "the order of that epoch from random numbers that are gone; resume from a checkpoint at the end of an epoch "
            "(save_strategy='epoch') or in the first one, or give up the order with ignore_data_skip=True"
        )
    return counted
