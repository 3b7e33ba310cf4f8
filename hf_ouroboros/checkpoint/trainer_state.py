"""What Trainer's own state has to look like, field by field, and where the best model is after a move."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


# field -> whether a value is one that Trainer writes; fields that are not here are whatever they are
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "epoch": _or_none(_amount),
    "global_step": _count,
    "max_steps": _or_none(_number),
    "logging_steps": _or_none(_amount),
    "eval_steps": _or_none(_amount),
    "save_steps": _or_none(_amount),
    "train_batch_size": _or_none(_count),
    "num_train_epochs": _or_none(_amount),
    "num_input_tokens_seen": _or_none(_amount),
    "total_flos": _amount,
    "log_history": lambda value: isinstance(value, list) and all(isinstance(entry, dict) for entry in value),
    "best_metric": _or_none(_number),
    "best_global_step": _or_none(_count),
    "best_model_checkpoint": _or_none(_is(str)),
    "is_local_process_zero": _is(bool),
    "is_world_process_zero": _is(bool),
    "is_hyper_param_search": _is(bool),
    "stateful_callbacks": lambda value: (
        isinstance(value, dict) and all(isinstance(entry, (dict, list)) for entry in value.values())
    ),
}


def check_trainer_state(state: Mapping[str, Any]) -> None:
    """Refuses a state that Trainer would not have written.

    Raises:
        ValueError: names the field and its value.
    """
    if "global_step" not in state:
        raise ValueError("it has no global_step")
    known = {field.name for field in dataclasses.fields(TrainerState)}
    for name, value in state.items():
        if name not in known:
            raise ValueError(f"{name!r} is no field of this version's TrainerState")
        if name in _FIELDS and not _FIELDS[name](value):
            raise ValueError(f"{name} is {value!r}")


def best_checkpoint(state: Mapping[str, Any], checkpoint: str | Path) -> str | None:
    """Where the checkpoint of the best model so far is: beside the resumed one, wherever that has been moved to.

    Args:
        state: Trainer's state in the resumed checkpoint.
        checkpoint: the resumed checkpoint.

    Raises:
        FileNotFoundError: it is neither there nor where it was.
    """
    recorded = state.get("best_model_checkpoint")
    if recorded is None:
        return None
    beside = Path(checkpoint).parent / recorded.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    if beside.is_dir():
        same = os.path.isdir(recorded) and os.path.samefile(beside, recorded)
        return recorded if same else str(beside)
    if os.path.isdir(recorded):
        return recorded
    raise FileNotFoundError(f"neither {beside} nor {recorded} exists")
