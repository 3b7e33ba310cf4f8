"""Checkpoint files of several processes: each writes what it holds, and nobody holds the whole.

On a shared file system the files are where they belong as soon as they are written. Elsewhere each process writes to
its own disk, and the files travel to the main process in pieces.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import CheckpointError
from .grid import ProcessGrid

PIECE_BYTES = 64 * 2**20
SHARD_SIZE = "5GB"
OPTIMIZER_PARTS = "optimizer-*-of-*.pt"


def together(grid: ProcessGrid, group: dist.ProcessGroup, value: Any) -> list[Any]:
    """Every process's value, by rank; called by all processes at the same point."""
    values: list[Any] = [None] * grid.world_size
    dist.all_gather_object(values, value, group=group)
    return values


def bring_home(directory: Path, files: Iterable[str], grid: ProcessGrid, group: dist.ProcessGroup) -> None:
    """Has the files that processes wrote into a directory of that name arrive in the main process's one.

    Args:
        directory: the same path in all processes; on one file system or several.
        files: names of the files that this process wrote there.
        grid: the processes.
        group: of all processes.

    Raises:
        CheckpointError: a file did not arrive.
    """
    token = directory / ".main"
    if grid.rank == 0:
        token.touch()
    dist.barrier(group)
    sees_main = token.exists()
    lists = together(grid, group, [] if sees_main else [(n, (directory / n).stat().st_size) for n in files])
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
            file.write(piece.numpy())


# ---- weights ----


def save_weights(model: PreTrainedModel, directory: Path, grid: ProcessGrid, group: dist.ProcessGroup) -> None:
    """Writes a model's weights in Hub format: each device of the first replica its shards, the main process the index.

    Args:
        model: what this process does not hold is on the meta device.
        directory: exists in the main process.
        grid: the processes.
        group: of all processes.
    """
    own: list[str] = []
    weight_map: dict[str, str] = {}
    part = directory / f".part-{grid.device_index}"
    if grid.replica == 0:
        directory.mkdir(parents=True, exist_ok=True)
        part.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(_held(model), part, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})
        own = sorted(path.name for path in part.glob("*.safetensors"))
        for file in own:
            with safe_open(part / file, "pt") as opened:
                weight_map |= {name: file for name in opened.keys()}
    gathered = together(grid, group, (own, weight_map))
    files = [(rank, file) for rank, (names, _) in enumerate(gathered) for file in names]
    final = {
        key: SAFE_WEIGHTS_NAME if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        for i, key in enumerate(files)
    }
    if grid.rank == 0:
        for stale in [*directory.glob("model*.safetensors"), *directory.glob(SAFE_WEIGHTS_INDEX_NAME)]:
            stale.unlink()
    dist.barrier(group)
    for file in own:
        (part / file).rename(directory / final[grid.rank, file])
    if grid.replica == 0:
        shutil.rmtree(part)
    bring_home(directory, [final[grid.rank, file] for file in own], grid, group)
    if grid.rank == 0 and len(files) > 1:
        names = {name: final[rank, file] for rank, (_, names) in enumerate(gathered) for name, file in names.items()}
        size = sum((directory / name).stat().st_size for name in final.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    dist.barrier(group)


def load_weights(model: PreTrainedModel, directory: str | Path) -> None:
    """Reads those parameters and buffers of a saved model that this process holds.

    Raises:
        CheckpointError: a file or a tensor is missing, damaged, or of another shape.
    """
    directory = Path(directory)
    try:
        if (directory / SAFE_WEIGHTS_INDEX_NAME).is_file():
            index = json.loads((directory / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        else:
            files = [SAFE_WEIGHTS_NAME]
        wanted = _held(model)
        with torch.no_grad():
            for file in files:
                with safe_open(directory / file, "pt") as opened:
                    for name in wanted.keys() & set(opened.keys()):
                        wanted.pop(name).copy_(opened.get_tensor(name))
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the model in {directory} can't be read: {error}") from error
    if wanted:
        raise CheckpointError(f"the model in {directory} has no {min(wanted)!r}; it belongs to another model")


def _held(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers that a checkpoint has and this process holds; a tied matrix under one name."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: value for name, value in model.state_dict().items() if not value.is_meta and name not in tied}


# ---- optimizer ----


def save_optimizer(state_dict: dict[str, Any], directory: Path, grid: ProcessGrid) -> list[str]:
    """Writes the optimizer state of this process's parameters in the stock format; returns the file's name."""
    if grid.replica:
        return []
    name = f"optimizer-{grid.device_index + 1:05d}-of-{grid.num_devices:05d}.pt"
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(state_dict, directory / name)
    return [name]


def load_optimizer(directory: str | Path, wanted: Callable[[int], bool] = lambda index: True) -> dict[str, Any]:
    """The optimizer state of a checkpoint of one process or several, of the parameters that are wanted.

    Args:
        directory: the checkpoint.
        wanted: tells for a parameter's index in the optimizer whether its state is needed here.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    directory = Path(directory)
    files = sorted(directory.glob(OPTIMIZER_PARTS)) or [directory / "optimizer.pt"]
    state: dict[str, Any] = {"state": {}}
    for file in files:
        try:
            part = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch.load raises what its readers happen to raise
            raise CheckpointError(f"{file} can't be read: {error}") from error
        state["param_groups"] = part["param_groups"]
        for index, entry in part["state"].items():
            if wanted(index):
                # Copies: the mapped file may be deleted while the run goes on.
                state["state"][index] = {k: v.clone() if torch.is_tensor(v) else v for k, v in entry.items()}
    return state
