"""Old checkpoints to what transformers 5 loads: config.json, model.safetensors, tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from .configuration_transfo_xl import TransfoXLConfig
from .errors import ConversionError
from .modeling_transfo_xl import TransfoXLLMHeadModel
from .original import inferred_config, is_original, module_config, module_state, renamed
from .safe_pickle import Stub, load_pickle
from .vocabulary import build_tokenizer, read_vocabulary

CHECKPOINTS = ("model.safetensors", "pytorch_model.bin", "model.pt")
VOCABULARIES = ("vocab.pkl", "vocab.bin", "vocab.txt", "cache.pt")


def convert(
    source: str | Path,
    target: str | Path,
    config: dict[str, Any] | None = None,
    allow_stubs: bool = False,
    add_eos: bool | None = None,
) -> tuple[TransfoXLLMHeadModel | None, PreTrainedTokenizerFast | None]:
    """Converts the checkpoint and the vocabulary of a folder, whichever of them it has; executes nothing in it.

    Args:
        source: a folder with a checkpoint (the first of model.safetensors, pytorch_model.bin, model.pt) and
            config.json, or a vocabulary (the first of vocab.pkl, vocab.bin, vocab.txt, cache.pt), or both. Checkpoints
            of the original PyTorch repository need no config.json if they hold the whole module.
        target: folder for the result, loadable with the Auto classes; made if needed.
        config: values that win over those of config.json, or that a checkpoint without one doesn't tell.
        allow_stubs: read pickles with objects of other classes than plain data, which become inert: needed for the
            original repository's model.pt and cache.pt.
        add_eos: see `vocabulary.build_tokenizer`.

    Returns:
        The model and the tokenizer; None for what the folder doesn't have.

    Raises:
        ConversionError: nothing to convert; an unsafe or damaged file; parameters, configuration and vocabulary that
            don't belong together.
    """
    source, target = Path(source), Path(target)
    checkpoint, vocabulary = _first(source, CHECKPOINTS), _first(source, VOCABULARIES)
    if checkpoint is None and vocabulary is None:
        raise ConversionError(
            f"{source} holds neither a checkpoint ({', '.join(CHECKPOINTS)}) nor a vocabulary "
            f"({', '.join(VOCABULARIES)})"
        )
    model = tokenizer = None
    if checkpoint is not None:
        model = _read_model(checkpoint, config or {}, allow_stubs)
    if vocabulary is not None:
        tokenizer = build_tokenizer(read_vocabulary(vocabulary, allow_stubs), add_eos)
    if model is not None and tokenizer is not None and len(tokenizer) != model.config.vocab_size:
        raise ConversionError(f"{vocabulary} has {len(tokenizer)} words, the model {model.config.vocab_size}")
    # Only now: a conversion that fails leaves nothing behind.
    for result in (model, tokenizer):
        if result is not None:
            result.save_pretrained(target)
    return model, tokenizer


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_model(path: Path, given: dict[str, Any], allow_stubs: bool) -> TransfoXLLMHeadModel:
    state, told = _read_state(path, allow_stubs)
    original = is_original(state)
    if original:
        state = renamed(state)
    config_file = path.with_name("config.json")
    if config_file.is_file():
        values = json.loads(config_file.read_text(encoding="utf-8"))
    elif original:
        values = inferred_config(state, told | given)
    else:
        raise ConversionError(f"{path.parent} has no config.json")
    config = TransfoXLConfig.from_dict(values | given)
    model, info = TransfoXLLMHeadModel.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            names = ", ".join(sorted(map(str, info[what])))
            raise ConversionError(f"{path} doesn't fit its configuration; {what.replace('_', ' ')}: {names}")
    model.config.name_or_path = str(path.parent)
    return model


def _read_state(path: Path, allow_stubs: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Parameters by name, and what a whole module tells of its configuration."""
    if path.suffix == ".safetensors":
        return load_file(path), {}
    content, told = load_pickle(path, allow_stubs), {}
    if isinstance(content, Stub):
        content, told = dict(module_state(content)), module_config(content)
    tensors = isinstance(content, dict) and all(isinstance(value, torch.Tensor) for value in content.values())
    if not tensors or not content:
        raise ConversionError(f"{path} holds neither a state dict nor a module")
    return content, told
