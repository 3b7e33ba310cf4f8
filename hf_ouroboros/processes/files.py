"""Checkpoint files of several processes: each writes what it holds, and nobody holds the whole.

On a shared file system the files are where they belong as soon as they are written. Elsewhere each process writes to
its own disk, and the files travel to the main process in pieces.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoint.hashes import FileHashes
from ..checkpoint.weights import converted, written_tensors

if TYPE_CHECKING:
    from .grid import ProcessGrid
    from .processes import Processes

T = TypeVar("T")

PIECE_BYTES = 64 * 2**20
SHARD_SIZE = "5GB"


def gather_objects(grid: ProcessGrid, group: dist.ProcessGroup, value: T) -> list[T]:
    """Every process's value, by rank; called by all processes at the same point."""
    values: list[Any] = [None] * grid.world_size
    dist.all_gather_object(values, value, group=group)
    return values


def gather_files(
    directory: Path,
    files: Iterable[str],
    grid: ProcessGrid,
    group: dist.ProcessGroup,
    hashes: FileHashes | None = None,
) -> None:
    """Has the files that processes wrote into a directory of that name arrive in the main process's one.

    Args:
        directory: the same path in all processes; on one file system or several.
        files: names of the files that this process wrote there.
        grid: the processes.
        group: of all processes.
        hashes: takes the files of this process, whose checksums are wanted.
    """
    files = list(files)
    if hashes is not None:
        hashes.add(files)
    token = directory / ".main"
    if grid.rank == 0:
        token.touch()
    dist.barrier(group)
    sees_main = token.exists()
    lists = gather_objects(grid, group, [] if sees_main else [(n, (directory / n).stat().st_size) for n in files])
    for rank, wanted in enumerate(lists):
        for name, size in wanted:
            if grid.rank == rank:
                _send(directory / name, size, group)
            elif grid.rank == 0:
                _receive(directory / name, size, rank, group)
    dist.barrier(group)
    if grid.rank == 0:
        token.unlink()
    elif not sees_main:
        if hashes is not None:
            hashes.results()  # all have been read
        shutil.rmtree(directory)


def _send(path: Path, size: int, group: dist.ProcessGroup) -> None:
    with open(path, "rb") as file:
        for start in range(0, size, PIECE_BYTES):
            piece = bytearray(file.read(min(PIECE_BYTES, size - start)))
            dist.send(torch.frombuffer(piece, dtype=torch.uint8), 0, group=group)


def _receive(path: Path, size: int, rank: int, group: dist.ProcessGroup) -> None:
    with open(path, "wb") as file:
        for start in range(0, size, PIECE_BYTES):
            piece = torch.empty(min(PIECE_BYTES, size - start), dtype=torch.uint8)
            dist.recv(piece, rank, group=group)
            file.write(piece.numpy().data)
        file.flush()
        os.fsync(file.fileno())


# ---- weights ----


def save_weights(
    model: PreTrainedModel, directory: Path, processes: Processes, hashes: FileHashes | None = None
) -> None:
    """Writes a model's weights in Hub format: each device of the first replica its shards, the main process the index.

    Args:
        model: what this process does not hold is on the meta device.
        directory: exists in the main process.
        processes: of the run.
        hashes: takes the files of this process, whose checksums are wanted.
    """
    own: list[str] = []
    weight_map: dict[str, str] = {}
    part = directory / f".part-{processes.device_index}"
    held = written_tensors(model)
    # A frozen matrix that the first and the last stage share, and a buffer beside several stages, are in several processes.
    before = processes.gather(set(held) if processes.replica == 0 else set())[: processes.rank]
    held = {name: value for name, value in held.items() if not any(name in names for names in before)}
    if processes.replica == 0:
        directory.mkdir(parents=True, exist_ok=True)
        part.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(converted(model, held), part, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})
        own = sorted(path.name for path in part.glob("*.safetensors"))
        for file in own:
            with safe_open(part / file, "pt") as opened:
                weight_map |= {name: file for name in opened.keys()}
    gathered = processes.gather((own, weight_map))
    files = [(rank, file) for rank, (names, _) in enumerate(gathered) for file in names]
    final = {
        key: SAFE_WEIGHTS_NAME if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        for i, key in enumerate(files)
    }
    if processes.is_main:
        for stale in [*directory.glob("model*.safetensors"), *directory.glob(SAFE_WEIGHTS_INDEX_NAME)]:
            stale.unlink()
    processes.barrier()
    for file in own:
        (part / file).rename(directory / final[processes.rank, file])
    if processes.replica == 0:
        shutil.rmtree(part)
    processes.gather_files(directory, [final[processes.rank, file] for file in own], hashes)
    if processes.is_main and len(files) > 1:
        names = {name: final[rank, file] for rank, (_, names) in enumerate(gathered) for name, file in names.items()}
        size = sum((directory / name).stat().st_size for name in final.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    processes.barrier()


# ---- optimizer ----


def save_optimizer(state_dict: dict[str, Any], directory: Path, processes: Processes) -> list[str]:
    """Writes the optimizer state of this process's parameters in the stock format; returns the file's name."""
    if processes.replica:
        return []
    name = f"optimizer-{processes.device_index + 1:05d}-of-{processes.processes_per_replica:05d}.pt"
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(state_dict, directory / name)
    return [name]
