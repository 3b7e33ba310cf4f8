"""The run state beside Trainer's stock files: gradients to come and memories, one file per process, clocks in the manifest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..engine.state import RunState
from ..errors import CheckpointError, CheckpointMismatchError
from .manifest import Manifest, StatePart, find_changes, read_manifest, write_manifest

STATE_TENSORS = "ouroboros_state.safetensors"


def save_run_state(directory: str | Path, state: RunState) -> None:
    """Writes the run state, and the manifest, into a checkpoint that is otherwise complete."""
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
    return StatePart(name, replica, state.meta())


def load_run_state(
    directory: str | Path, stages: Collection[int] | None = None, replica: int = 0, replicas: int = 1
) -> RunState:
    """Reads the run state of a checkpoint whose files are as they were written; arguments as for `read_run_state`.

    Raises:
        CheckpointError: no such state (a model alone, or another trainer's checkpoint), or files that are missing,
            cut off, or changed.
    """
    manifest = read_manifest(directory)
    for name, what in find_changes(directory, manifest).items():
        raise CheckpointError(f"checkpoint {directory} is damaged: {name} {what}")
    return read_run_state(Path(directory), manifest, stages, replica, replicas)


def read_run_state(
    directory: Path, manifest: Manifest, stages: Collection[int] | None = None, replica: int = 0, replicas: int = 1
) -> RunState:
    """Reads the run state of a checkpoint.

    Args:
        directory: the checkpoint.
        manifest: of the checkpoint.
        stages: whose pending gradients and memories to read; None for all.
        replica: which replica this process belongs to.
        replicas: R of this run. If the checkpoint was written with another R, every replica gets the mean of the
            gradients of its replicas, so that the update they make is the same, and the memories of all columns.

    Raises:
        CheckpointMismatchError: another R, and with weights="now" there are no gradients yet of which to take the mean.
        CheckpointError: a file can't be read, or does not hold what the manifest says.
    """
    meta = manifest.meta
    if meta["replicas"] != replicas and meta.get("weights") == "now" and any(meta["pending_ticks"].values()):
        raise CheckpointMismatchError(
            f"the checkpoint was written by {meta['replicas']} replicas with weights='now', which each have micro-batches of their own "
            f"whose backward is still to come, and this run has {replicas}; resume with data_parallel_replicas={meta['replicas']}, or "
            "start anew from its weights (model_name_or_path)"
        )
    own = [part for part in meta["parts"] if meta["replicas"] != replicas or part["replica"] == replica]
    ticks = {s: entries for s, entries in meta["pending_ticks"].items() if stages is None or int(s) in stages}
    gradients: dict[str, torch.Tensor] = {}
    memories: dict[str, torch.Tensor] = {}
    streams, holders = _newest_memories(own)
    for part in own:
        try:
            for name, tensor in load_file(directory / part["file"]).items():
                kind, stage, number, _ = name.split(".", 3)
                if stage not in ticks:
                    continue
                if kind == "memory":
                    if holders.get(number) == part["replica"]:
                        memories[name] = tensor
                else:
                    gradients[name] = gradients[name] + tensor if name in gradients else tensor
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{directory / part['file']} can't be read: {error}") from error
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
