"""Checkpoints on disk: the run state beside Trainer's stock files, and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .engine.state import RunState, check_format
from .errors import CheckpointError

STATE_TENSORS = "ouroboros_state.safetensors"
STATE_META = "ouroboros_state.json"
_STAGING = ".saving-"


@dataclass(frozen=True)
class StatePart:
    """A file with pending gradients and memories, as the manifest knows it.

    Args:
        file: its name.
        replica: whose they are.
        sha256: its checksum.
        meta: `RunState.meta()` of the process that wrote it.
    """

    file: str
    replica: int
    sha256: str
    meta: dict[str, Any]


def save_run_state(directory: str | Path, state: RunState) -> None:
    """Writes the run state, and a manifest of the checkpoint's files, into a checkpoint that is otherwise complete."""
    write_manifest(directory, [save_state_part(directory, state)], replicas=1)


def save_state_part(directory: str | Path, state: RunState, replica: int = 0, device: int | None = None) -> StatePart:
    """Writes the pending gradients and memories that a process holds.

    Args:
        directory: the checkpoint.
        state: of this process.
        replica: which replica's these are.
        device: which device's, where the state is spread over several files.
    """
    name = STATE_TENSORS if device is None else f"ouroboros_state-replica{replica}-device{device}.safetensors"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors().items()}
    save_file(tensors, Path(directory) / name)
    return StatePart(name, replica, _sha256(Path(directory) / name), state.meta())


def write_manifest(directory: str | Path, parts: Sequence[StatePart], replicas: int) -> None:
    """Writes what makes a checkpoint complete, last of all: clocks, and the sizes of its files.

    Args:
        directory: the checkpoint, with all other files in it.
        parts: of all processes.
        replicas: R.
    """
    directory = Path(directory)
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}
    ticks = {stage: entries for part in parts for stage, entries in part.meta["pending_ticks"].items()}
    listed = [
        {"file": part.file, "replica": part.replica, "sha256": part.sha256, "streams": part.meta["streams"]}
        for part in parts
    ]
    meta = {**parts[0].meta, "pending_ticks": ticks, "replicas": replicas, "parts": listed, "files": sizes}
    del meta["streams"]  # each replica has its own
    (directory / STATE_META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def load_run_state(
    directory: str | Path, stages: Collection[int] | None = None, replica: int = 0, replicas: int = 1
) -> RunState:
    """Reads the run state of a checkpoint.

    Args:
        directory: the checkpoint.
        stages: whose pending gradients and memories to read; None for all.
        replica: which replica this process belongs to.
        replicas: R of this run. If the checkpoint was written with another R, every replica gets the mean of the
            gradients of its replicas, so that the update they make is the same, and the memories of all columns.

    Raises:
        CheckpointError: no such state (a model alone, or another trainer's checkpoint), or files that are missing,
            cut off, or changed.
    """
    directory = Path(directory)
    meta = _load_manifest(directory)
    own = [part for part in meta["parts"] if meta["replicas"] != replicas or part["replica"] == replica]
    ticks = {s: entries for s, entries in meta["pending_ticks"].items() if stages is None or int(s) in stages}
    gradients: dict[str, torch.Tensor] = {}
    memories: dict[str, torch.Tensor] = {}
    streams, holders = _newest_memories(own)
    for part in own:
        for name, tensor in _load_part(directory, part).items():
            kind, stage, number, _ = name.split(".", 3)
            if stage not in ticks:
                continue
            if kind == "memory":
                if holders.get(number) == part["replica"]:
                    memories[name] = tensor
            else:
                gradients[name] = gradients[name] + tensor if name in gradients else tensor
    if meta["replicas"] != replicas:
        gradients = {name: tensor / meta["replicas"] for name, tensor in gradients.items()}
    return RunState.from_parts({**meta, "pending_ticks": ticks, "streams": streams}, gradients | memories)


def _newest_memories(parts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Position of every column group, and the replica whose memory of it counts.

    After a change of R, a replica goes on holding what it was given of columns that now are another one's: of groups that
    overlap, the one that is furthest counts.
    """
    streams: dict[str, list[int]] = {}
    holders: dict[str, int] = {}
    found = [
        (-segment, int(group), width, part["replica"])
        for part in parts
        for group, (width, segment) in part["streams"].items()
    ]
    for segment, group, width, replica in sorted(found):
        if all(group >= int(g) + w or int(g) >= group + width for g, (w, _) in streams.items()):
            streams[str(group)], holders[str(group)] = [width, -segment], replica
    return streams, holders


def _load_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, once all files have been found as it says."""
    if not directory.is_dir():
        raise CheckpointError(
            f"checkpoint {directory} does not exist, or is not a directory; of several hosts, each needs a copy"
        )
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
    check_format(meta)
    for name, size in meta.get("files", {}).items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != size:
            raise CheckpointError(
                f"checkpoint {directory} is damaged: {name} "
                + ("is missing" if found is None else f"has {found} bytes instead of {size}")
            )
    try:
        for part in meta["parts"]:
            str(part["file"]), int(part["replica"]), str(part["sha256"]), dict(part["streams"])
        int(meta["replicas"]), dict(meta["pending_ticks"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / STATE_META} is damaged: {type(error).__name__}: {error}") from error
    return meta


def _load_part(directory: Path, part: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    path = directory / part["file"]
    try:
        if _sha256(path) != part["sha256"]:
            raise CheckpointError(f"{path} is damaged: its checksum differs from {STATE_META}")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


@contextlib.contextmanager
def offering_earlier(checkpoint: str | Path) -> Iterator[None]:
    """Adds to the error about a damaged checkpoint which earlier one beside it is complete."""
    try:
        yield
    except CheckpointError as error:
        earlier = _newest_complete_before(Path(checkpoint))
        if earlier is None:
            raise
        raise CheckpointError(
            f"{error}. The checkpoint before it is complete: resume_from_checkpoint={str(earlier)!r}"
        ) from error


def _newest_complete_before(checkpoint: Path) -> Path | None:
    for step, path in sorted(_numbered(checkpoint.parent), reverse=True):
        if step < _number_of(checkpoint):
            with contextlib.suppress(CheckpointError):
                load_run_state(path)
                return path
    return None


def _numbered(directory: Path) -> list[tuple[int, Path]]:
    return [(_number_of(path), path) for path in directory.glob("checkpoint-*") if _number_of(path)]


def _number_of(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else 0


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
