"""Weights of a saved model: looked at by their headers first, then copied into those parameters that a process holds."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import CheckpointError, CheckpointMismatchError
from ..partition.owned_weights import load_owned

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
READING = (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a file.

    Args:
        file: name of the file.
        shape: its shape.
        dtype: as safetensors spells it.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


def saved_weights(directory: Path, files: Iterable[str] | None = None) -> dict[str, SavedTensor]:
    """The tensors of a saved model by name, from the headers of its files.

    Args:
        directory: of the model.
        files: names of its files; None for those that the model's index names, or the only one.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    found: dict[str, SavedTensor] = {}
    try:
        for file in _indexed(directory) if files is None else sorted(files):
            with safe_open(directory / file, "pt") as opened:
                for name in opened.keys():
                    tensor = opened.get_slice(name)
                    if name in found:
                        raise ValueError(f"{name!r} is in {found[name].file} and in {file}")
                    found[name] = SavedTensor(file, tuple(tensor.get_shape()), tensor.get_dtype())
    except READING as error:
        raise CheckpointError(f"the model in {directory} can't be read: {type(error).__name__}: {error}") from error
    return found


def _indexed(directory: Path) -> list[str]:
    if not (directory / SAFE_WEIGHTS_INDEX_NAME).exists():
        return [SAFE_WEIGHTS_NAME]
    index = json.loads((directory / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))


def check_weights(model: nn.Module, saved: Mapping[str, SavedTensor], directory: Path) -> None:
    """Refuses weights that are not this model's, whichever process holds them.

    Raises:
        CheckpointMismatchError: names, shapes or dtypes differ.
    """
    expected, tied = _saved_names(model)
    if saved.keys() != expected.keys():
        expected = converted(model, expected)
    other = f"the model in {directory}"
    what = "it belongs to another model; resume with the model that the checkpoint was written with"
    if missing := [name for name in expected if name not in saved]:
        raise CheckpointMismatchError(f"{other} has no {min(missing)!r}; {what}" + _about_tying(missing, tied, False))
    if foreign := [name for name in saved if name not in expected]:
        raise CheckpointMismatchError(
            f"{other} has {min(foreign)!r}, which this run's model has not; {what}" + _about_tying(foreign, tied, True)
        )
    for name, tensor in expected.items():
        check_tensor(name, saved[name], tensor, other, what)


def check_tensor(name: str, found: SavedTensor, tensor: torch.Tensor, other: str, what: str) -> None:
    """Raises CheckpointMismatchError where a saved tensor has another shape or dtype than the model's.

    Args:
        name: in the file.
        found: what is there.
        tensor: the model's.
        other: what it was saved in, for the message.
        what: what that means and what to do.
    """
    if found.shape != tuple(tensor.shape):
        raise CheckpointMismatchError(f"{other} has {name!r} {found.shape} instead of {tuple(tensor.shape)}; {what}")
    if found.dtype != _DTYPES.get(tensor.dtype, found.dtype):
        raise CheckpointMismatchError(
            f"{other} has {name!r} as {found.dtype} instead of {_DTYPES[tensor.dtype]}, the dtype of this run's model; "
            "load the model with the same dtype"
        )


def _about_tying(names: Iterable[str], tied: set[str], untied_there: bool) -> str:
    if untied_there and tied & set(names):
        return ". There its embeddings are not tied, here they are (tie_word_embeddings)"
    if not untied_there and any("lm_head" in name or "embed_out" in name for name in names):
        return ". There its embeddings may be tied, which they are not here (tie_word_embeddings)"
    return ""


def load_weights(model: nn.Module, directory: str | Path, saved: Mapping[str, SavedTensor] | None = None) -> None:
    """Reads those parameters and buffers of a saved model that this process holds.

    Args:
        model: what this process does not hold is on the meta device.
        directory: of the saved model.
        saved: what is there, if it was looked at already.

    Raises:
        CheckpointError: a file or a tensor is missing, damaged, or of another shape; then nothing has been loaded, unless
            a file changed meanwhile.
    """
    directory = Path(directory)
    saved = saved_weights(directory) if saved is None else saved
    check_weights(model, saved, directory)
    held = held_tensors(model)
    if not held.keys() <= saved.keys():
        _load_converted(model, directory, held)
        return
    try:
        with torch.no_grad():
            for file in sorted({saved[name].file for name in held if name in saved}):
                with safe_open(directory / file, "pt") as opened:
                    for name in [name for name in held if name in saved and saved[name].file == file]:
                        held[name].copy_(opened.get_tensor(name))
    except READING as error:
        raise CheckpointError(f"the model in {directory} can't be read: {type(error).__name__}: {error}") from error


def _load_converted(model: nn.Module, directory: Path, held: Mapping[str, torch.Tensor]) -> None:
    """As `load_weights`, for an architecture whose files have other names and shapes: transformers converts them."""
    double = any(value.dtype is torch.float64 for value in held.values())
    try:
        part = load_owned(
            directory,
            held.__contains__,
            type(model),
            config=copy.deepcopy(model.config),
            dtype=torch.float64 if double else torch.float32,  # holds the values of every smaller one
        )
    except READING as error:
        raise CheckpointError(f"the model in {directory} can't be read: {type(error).__name__}: {error}") from error
    with torch.no_grad():
        for name, value in part.state_dict().items():
            if name in held and not value.is_meta:
                held[name].copy_(value)


def converted(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model by their names, and in the shapes, of the architecture's files on the Hub."""
    if not isinstance(model, PreTrainedModel):
        return dict(tensors)
    # Parts of a tensor (an expert of all) get memory of their own: safetensors writes nothing that shares it.
    return {
        name: value if name in tensors else value.clone(memory_format=torch.contiguous_format)
        for name, value in revert_weight_conversion(model, dict(tensors)).items()
    }


def held_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers that a checkpoint has and this process holds; a tied matrix under one name."""
    tied = _tied_names(model)
    return {name: value for name, value in model.state_dict().items() if not value.is_meta and name not in tied}


def written_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What this process can write of a model: what it holds, but a buffer only where parameters of its module are."""
    buffers = {name for name, _ in model.named_buffers()}
    return {name: v for name, v in held_tensors(model).items() if name not in buffers or _uses_buffer(model, name)}


def _uses_buffer(model: nn.Module, name: str) -> bool:
    while name:
        name = name.rpartition(".")[0]
        if parameters := list(model.get_submodule(name).parameters()):
            return not all(p.is_meta for p in parameters)
    return True


def _saved_names(model: nn.Module) -> tuple[dict[str, torch.Tensor], set[str]]:
    """What a checkpoint of the whole model has, and names that it has not, as they are tied to others."""
    tied = _tied_names(model)
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state = {name: value for name, value in state.items() if not re.search(pattern, name)}
    return state, tied


def _tied_names(model: nn.Module) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", None) or ())
