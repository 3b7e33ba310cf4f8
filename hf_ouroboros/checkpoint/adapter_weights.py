"""Files of adapters: what PEFT writes of a model, by the names of the model's own tensors; looked at, checked and read.

    default    adapter_model.safetensors          base_model.model.h.0.attn.lora_A.weight
    style      style/adapter_model.safetensors    the same name, of another tensor

Writing is PEFT's. Where processes hold parts of a model, they hand theirs to the main process, which has PEFT write them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from ..errors import CheckpointError, CheckpointMismatchError, UnsupportedModelError
from .weights import READING, SavedTensor, check_tensor, saved_weights

WEIGHTS = "adapter_model.safetensors"
Saved = dict[tuple[str, str], SavedTensor]
"""{(file, name in it): what is there}"""


def names_in_files(model: Any, embeddings: bool | Literal["auto"] = False) -> dict[tuple[str, str], str]:
    """{(file, name in it): name in the model's `state_dict()`} of everything that PEFT saves.

    Args:
        model: a PeftModel, with or without weights.
        embeddings: PEFT's `save_embedding_layers`.
    """
    from peft import get_peft_model_state_dict

    state = model.state_dict()
    names = {id(value): name for name, value in state.items()}
    found: dict[tuple[str, str], str] = {}
    for adapter in model.peft_config:
        file = WEIGHTS if adapter == "default" else f"{adapter}/{WEIGHTS}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about embeddings, which saving says once more
            part = get_peft_model_state_dict(
                model, state_dict=state, adapter_name=adapter, save_embedding_layers=embeddings
            )
        for key, value in part.items():
            if id(value) not in names:
                raise UnsupportedModelError(
                    f"PEFT computes {key} of the adapter {adapter!r} when it saves it, which stages can't; {adapter!r} is a "
                    f"{model.peft_config[adapter].peft_type}"
                )
            found[file, key] = names[id(value)]
    return found


def look_at(model: Any, directory: Path) -> Saved:
    """The tensors in the files of a model's adapters, from their headers.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    files = sorted({file for file, _ in names_in_files(model)})
    return {(file, name): tensor for file in files for name, tensor in saved_weights(directory, [file]).items()}


def check(model: Any, saved: Mapping[tuple[str, str], SavedTensor], directory: Path) -> None:
    """Refuses adapters that are not this model's, whichever process holds them.

    Raises:
        CheckpointMismatchError: names, shapes or dtypes differ.
    """
    needed, known, state = names_in_files(model), names_in_files(model, embeddings=True), model.state_dict()
    what = "it belongs to another adapter; resume with the model and the adapters that the checkpoint was written with"
    if missing := [f"{file} has no {key!r}" for file, key in needed if (file, key) not in saved]:
        raise CheckpointMismatchError(f"{directory}: {min(missing)}; {what}")
    if foreign := [f"{file} has {key!r}" for file, key in saved if (file, key) not in known]:
        raise CheckpointMismatchError(f"{directory}: {min(foreign)}, which this run's model has not; {what}")
    for (file, key), found in saved.items():
        check_tensor(key, found, state[known[file, key]], f"{directory / file}", what)


def load(model: Any, directory: Path, saved: Mapping[tuple[str, str], SavedTensor]) -> None:
    """Reads what this process holds of a model's adapters.

    Raises:
        CheckpointError: a file or a tensor is missing or damaged.
    """
    check(model, saved, directory)
    names, state = names_in_files(model, embeddings=True), model.state_dict()
    try:
        with torch.no_grad():
            for file in sorted({file for file, _ in saved}):
                with safe_open(directory / file, "pt") as opened:
                    for key in [key for own, key in saved if own == file]:
                        if not (target := state[names[file, key]]).is_meta:
                            target.copy_(opened.get_tensor(key))
    except READING as error:
        raise CheckpointError(f"the adapters in {directory} can't be read: {type(error).__name__}: {error}") from error


def held(model: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Those of the model's tensors that this process holds, each in memory of its own."""
    state = model.state_dict()
    return {name: state[name].cpu().clone() for name in sorted(set(names)) if not state[name].is_meta}
