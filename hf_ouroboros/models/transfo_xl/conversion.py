"""Old checkpoints to what transformers 5 loads: config.json, model.safetensors, tokenizer.json."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from ...errors import InputFileError, OuroborosError
from ...options import from_json, shortened, shown
from ...user_files import check_folder_writable, check_writable, read_text, written_together
from .configuration_transfo_xl import TransfoXLConfig
from .errors import ConversionError
from .modeling_transfo_xl import TransfoXLLMHeadModel
from .original import inferred_config, is_original, module_config, module_state, renamed
from .safe_pickle import Stub, load_pickle
from .vocabulary import build_tokenizer, read_vocabulary

CHECKPOINTS = ("model.safetensors", "pytorch_model.bin", "model.pt")
MOST_CONFIG = 2**26  # bytes
MOST_LAYERS = 1024
MOST_VIEWS = 8  # a parameter may stand in a file under several names
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
        OutputFileError: nothing can be written in the target.
    """
    source, target = Path(source), Path(target)
    check_folder_writable("target", target)
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
    _save([result for result in (model, tokenizer) if result is not None], target)
    return model, tokenizer


def _save(results: Sequence[Any], target: Path) -> None:
    """All files or none: they are written elsewhere, and get their names once they are complete."""
    with tempfile.TemporaryDirectory() as scratch:
        for result in results:
            result.save_pretrained(scratch)
        names = sorted(path.name for path in Path(scratch).iterdir())
        targets = [target / name for name in names]
        check_writable("target", *targets)
        with written_together(*targets) as fresh:
            for name, new in zip(names, fresh, strict=True):
                shutil.copyfile(Path(scratch, name), new)


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_model(path: Path, given: dict[str, Any], allow_stubs: bool) -> TransfoXLLMHeadModel:
    state, told = _read_state(path, allow_stubs)
    original = is_original(state)
    config_file = path.with_name("config.json")
    with _understood(path, "is no checkpoint of a Transformer-XL"):
        if original:
            state = renamed(state)
        if config_file.exists():
            values = _read_config(config_file)
        elif original:
            values = inferred_config(state, told | given)
        else:
            raise ConversionError(f"{path.parent} has no config.json")
    with _understood(path, "has a configuration that no Transformer-XL has"):
        config = TransfoXLConfig.from_dict(values | given)
        _check_size(config, state, path)
    loaded = TransfoXLLMHeadModel.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, info = cast(tuple[TransfoXLLMHeadModel, dict[str, Any]], loaded)  # a pair, with `output_loading_info`
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            names = shortened(", ".join(sorted(map(str, info[what]))))
            raise ConversionError(f"{path} doesn't fit its configuration; {what.replace('_', ' ')}: {names}")
    model.config.name_or_path = str(path.parent)
    return model


def _read_state(path: Path, allow_stubs: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Parameters by name, and what a whole module tells of its configuration."""
    if path.suffix == ".safetensors":
        with _understood(path, "is damaged"):
            return load_file(path), {}
    content, told = load_pickle(path, allow_stubs), {}
    if isinstance(content, Stub):
        with _understood(path, "is no module of the original repository"):
            module = content
            content, told = dict(module_state(module)), module_config(module)
    tensors = isinstance(content, dict) and all(isinstance(value, torch.Tensor) for value in content.values())
    if not tensors or not content:
        raise ConversionError(f"{path} holds neither a state dict nor a module")
    if not all(isinstance(name, str) for name in content):
        raise ConversionError(f"{path} holds parameters without names")
    size, found = path.stat().st_size, sum(tensor.numel() * tensor.element_size() for tensor in content.values())
    if found > MOST_VIEWS * size:  # one number may be viewed as a tensor of any size
        raise ConversionError(f"{path} holds tensors of {found:,} bytes in a file of {size:,}")
    return content, told


def _read_config(file: Path) -> dict[str, Any]:
    try:
        values = from_json(read_text(file, MOST_CONFIG))
    except (InputFileError, ValueError) as error:
        raise ConversionError(f"{file} is no configuration: {error}") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{file} is no configuration, but {shown(values)}")
    return values


def _check_size(config: TransfoXLConfig, state: dict[str, torch.Tensor], path: Path) -> None:
    """Before memory is taken: a configuration may name any sizes, and its model would be made with them."""
    if not isinstance(config.n_layer, int) or not 0 < config.n_layer <= MOST_LAYERS:
        raise ConversionError(
            f"{path}: n_layer={shown(config.n_layer)} must be a whole number from 1 to {MOST_LAYERS:,}"
        )
    with torch.device("meta"):
        wanted = sum(p.numel() for p in TransfoXLLMHeadModel(config).parameters())
    given = sum(tensor.numel() for tensor in state.values())
    if wanted > 2 * given + 10**8:
        raise ConversionError(
            f"{path} doesn't fit its configuration, which describes {wanted:,} parameters; there are {given:,}"
        )


@contextmanager
def _understood(path: Path, otherwise: str) -> Iterator[None]:
    """What is read may be anything, so that nearly any error may come of taking it for a Transformer-XL."""
    try:
        yield
    except OuroborosError:
        raise
    except Exception as error:
        raise ConversionError(f"{path} {otherwise} ({type(error).__name__}: {shortened(str(error))})") from error
