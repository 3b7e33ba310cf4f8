"""Mixed precision: decided once, from the options and from what accelerate was told (its launcher, its configuration file)."""

from __future__ import annotations

import os
from typing import Any

import torch

from .engine.graph import refuse_hooks_on_saved_tensors
from .errors import UnsupportedOptionError

VARIABLE = "ACCELERATE_MIXED_PRECISION"
"""Where `accelerate launch` puts --mixed_precision, or that of its configuration file."""


def autocast_dtype(args: Any) -> torch.dtype | None:
    """The dtype in which stages compute; None for that of their weights.

    Args:
        args: TrainingArguments.

    Raises:
        UnsupportedOptionError: accelerate was told of another precision than bf16.
    """
    if args.bf16:
        return torch.bfloat16
    asked = (getattr(args, "mixed_precision", None) or os.environ.get(VARIABLE) or "no").lower()
    if asked == "no":
        return None
    if asked != "bf16":
        raise UnsupportedOptionError(
            f"mixed precision {asked!r}, from accelerate's launcher, its configuration file or {VARIABLE}, is not supported by "
            "OuroborosTrainer: loss scaling couples all stages in every step; use bf16"
        )
    return torch.bfloat16


def check_surroundings() -> None:
    """Refuses what only the script's own thread has: a precision, or hooks on what backwards need.

    Raises:
        UnsupportedOptionError: training begins within `torch.autocast`, or hooks on saved tensors.
    """
    refuse_hooks_on_saved_tensors("train() is called")
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            raise UnsupportedOptionError(
                f"train() is called within torch.autocast({kind!r}), which the threads of the stages don't see; use bf16=True"
            )
