"""Checkpoints on disk: the run state beside Trainer's stock files, and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .engine.state import RunState
from .errors import CheckpointError

STATE_TENSORS = "ouroboros_state.safetensors"
STATE_META = "ouroboros_state.json"
_STAGING = ".saving-"


def save_run_state(directory: str | Path, state: RunState) -> None:
    """Writes the run state, and a manifest of the checkpoint's files, into a checkpoint that is otherwise complete."""
    directory = Path(directory)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors().items()}
    save_file(tensors, directory / STATE_TENSORS)
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}
    meta = {**state.meta(), "sha256": _sha256(directory / STATE_TENSORS), "files": sizes}
    (directory / STATE_META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def load_run_state(directory: str | Path) -> RunState:
    """Reads the run state of a checkpoint.

    Raises:
        CheckpointError: no such state (a model alone, or another trainer's checkpoint), or files that are missing,
            cut off, or changed.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory} does not exist, or is not a directory")
    try:
        meta = json.loads((directory / STATE_META).read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or not isinstance(meta.get("files", {}), dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {STATE_META}: it was not written by OuroborosTrainer, or with save_only_model=True. "
            "It can't be resumed exactly; load the model from it and start a new run"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{directory / STATE_META} is damaged: {error}") from error
    for name, size in meta.get("files", {}).items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != size:
            raise CheckpointError(
                f"checkpoint {directory} is damaged: {name} "
                + ("is missing" if found is None else f"has {found} bytes instead of {size}")
            )
    try:
        if _sha256(directory / STATE_TENSORS) != meta.get("sha256"):
            raise CheckpointError(f"{directory / STATE_TENSORS} is damaged: its checksum differs from {STATE_META}")
        tensors = load_file(directory / STATE_TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / STATE_TENSORS} can't be read: {error}") from error
    return RunState.from_parts(meta, tensors)


@contextlib.contextmanager
def appearing_whole(parent: str | Path) -> Iterator[Path]:
    """A directory to write checkpoints into; on leaving without an error they move into `parent` in one step each.

    A process that is killed meanwhile leaves `parent`'s checkpoints as they were; what it left over is cleared away
    by the next save.
    """
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob(f"{_STAGING}*"):
        shutil.rmtree(stale, ignore_errors=True)
    staging = parent / f"{_STAGING}{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
        for path in sorted(staging.iterdir()):
            _sync_files(path)
            target = parent / path.name
            if target.exists():
                old = staging / f"{path.name}.old"
                target.rename(old)
            path.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync_files(directory: Path) -> None:
    """Has the operating system write the files out before they get their final name."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
