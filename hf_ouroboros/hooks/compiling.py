"""Whether layers are compiled: as the arguments say, or what the script was launched by."""

from __future__ import annotations

import os

from transformers import TrainingArguments

from ..partition.compiled import Compilation

_LAUNCH = "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"
"""Set by `accelerate launch --dynamo_backend`."""


def compilation_of(args: TrainingArguments) -> Compilation | None:
    """How the layers of stages are compiled; None if they run as they are."""
    if args.torch_compile:
        return Compilation(args.torch_compile_backend or "inductor", args.torch_compile_mode)
    backend, mode = (os.environ.get(name, "").lower() for name in _LAUNCH)
    if backend in ("", "no"):
        return None
    return Compilation(backend, mode if mode not in ("", "default") else None)
