"""Saving and reading a model or its adapters, whichever it is; where processes hold parts, together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..adapters import is_adapted
from ..checkpoint import adapter_weights, weights
from .processes import Processes


def look_at(model: Any, directory: str | Path, model_files: Any = None) -> Any:
    """What is saved of a model in a directory, or of its adapters; raises CheckpointError.

    Args:
        model: the model.
        directory: of the saved model.
        model_files: gives the tensors of a model without adapters; None for what its index names.
    """
    if is_adapted(model):
        return adapter_weights.look_at(model, Path(directory))
    return weights.saved_weights(Path(directory)) if model_files is None else model_files()


def check(model: Any, saved: Mapping[Any, weights.SavedTensor], directory: str | Path) -> None:
    """Raises CheckpointMismatchError where it is another model's."""
    (adapter_weights.check if is_adapted(model) else weights.check_weights)(model, saved, Path(directory))


def load(model: Any, directory: str | Path, saved: Mapping[Any, weights.SavedTensor]) -> None:
    """Reads what this process holds; raises CheckpointError."""
    (adapter_weights.load if is_adapted(model) else weights.load_weights)(model, Path(directory), saved)


def gathered(model: Any, directory: Path, processes: Processes) -> dict[str, torch.Tensor]:
    """Everything that PEFT saves of a model, by its names there, in the main process; empty in the others.

    Args:
        model: a PeftModel; what this process does not hold is on the meta device.
        directory: where parts may be put on their way.
        processes: of the run; all of them call this at the same point.
    """
    # Whether embeddings are saved, the main process decides: PEFT may ask the Hub.
    names = set(adapter_weights.names_in_files(model, "auto").values()) if processes.is_main else set()
    wanted = processes.gather(names)[0]
    part = f".adapters-{processes.device_index}.safetensors"
    own = []
    if processes.replica == 0:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(adapter_weights.held(model, wanted), directory / part)
        own = [part]
    processes.gather_files(directory, own)
    found: dict[str, torch.Tensor] = {}
    if processes.is_main:
        for path in sorted(directory.glob(".adapters-*.safetensors")):
            found |= load_file(path)
            path.unlink()
    processes.barrier()
    return found
