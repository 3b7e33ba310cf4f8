"""Mixed precision: decided once, from the options and from what accelerate was told (its launcher, its configuration file)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .engine.graph import refuse_hooks_on_saved_tensors
from .errors import UnsupportedOptionError

VARIABLE = "ACCELERATE_MIXED_PRECISION"
"""Where `accelerate launch` puts --mixed_precision, or that of its configuration file."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(args: Any) -> torch.dtype | None:
    """The dtype in which stages compute; None for that of their weights.

    Args:
        args: TrainingArguments.

    Raises:
        UnsupportedOptionError: accelerate was told of another precision than bf16 and fp16.
    """
    if args.bf16:
        return torch.bfloat16
    if args.fp16:
        return torch.float16
    asked = (getattr(args, "mixed_precision", None) or os.environ.get(VARIABLE) or "no").lower()
    if asked == "no":
        return None
    if asked not in _DTYPES:
        raise UnsupportedOptionError(
            f"mixed precision {asked!r}, from accelerate's launcher, its configuration file or {VARIABLE}, is not supported by "
            f"OuroborosTrainer; use {' or '.join(_DTYPES)}"
        )
    return _DTYPES[asked]


@contextmanager
def without_scaler(args: Any) -> Iterator[None]:
    """Within this context, an Accelerator that Trainer makes does not scale losses: the engine does.

    Args:
        args: TrainingArguments.
    """
    if autocast_dtype(args) is not torch.float16:
        yield
        return
    asked, variable = getattr(args, "mixed_precision", None), os.environ.get(VARIABLE)
    args.mixed_precision = os.environ[VARIABLE] = "no"
    try:
        yield
    finally:
        args.mixed_precision = asked
        del os.environ[VARIABLE]
        if variable is not None:
            os.environ[VARIABLE] = variable


def check_trained(parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype | None) -> None:
    """Refuses to scale losses where gradients would be unscaled in half precision.

    Args:
        parameters: of the model, by name.
        dtype: in which stages compute.

    Raises:
        UnsupportedOptionError: names a parameter that is trained.
    """
    for name, parameter in parameters if dtype is torch.float16 else ():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise UnsupportedOptionError(
                f"fp16=True computes in float16 with weights in float32, but {name}, which is trained, is {parameter.dtype}; load the "
                "model with dtype=torch.float32, or leave fp16 off"
            )


def check_surroundings() -> None:
    """Refuses what only the script's own thread has: a precision, or hooks on what backwards need.

    Raises:
        UnsupportedOptionError: training begins within `torch.autocast`, or hooks on saved tensors.
    """
    refuse_hooks_on_saved_tensors("train() is called")
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            raise UnsupportedOptionError(
                f"train() is called within torch.autocast({kind!r}), which the threads of the stages don't see; use bf16=True or fp16=True"
            )
