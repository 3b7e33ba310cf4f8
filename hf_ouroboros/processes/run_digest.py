"""Facts: what a process knows about the run it is in, as plain values that can be compared with those of others."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import math
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import nn
from transformers import TrainingArguments

from .. import __version__
from ..adapters.describing import adapter_options
from ..partition.packed_tensors import is_own_kind, tensors_of
from .handshake import options_to_compare

SAMPLES = 16
"""Elements of a parameter that its checksum is made of: enough to tell models apart, and no time for large ones."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def plain(value: Any) -> Any:
    """A value as JSON can carry it, the same for equal values in different processes."""
    match value:
        case enum.Enum():
            return plain(value.value)
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case torch.Tensor():
            return plain(value.tolist()) if value.numel() <= SAMPLES and not value.is_meta else _of_tensor(value)
        case torch.Generator():
            return value.initial_seed()
        case functools.partial():
            return [plain(value.func), plain(value.args), plain(value.keywords)]
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case set() | frozenset():
            return sorted(map(str, value))
        case list() | tuple() | range():
            return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, type) or callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return _ADDRESS.sub("", str(value))


def software() -> dict[str, Any]:
    """Versions, and what else decides how kernels round. Patch releases of Python don't."""
    return {
        "version of python": ".".join(platform.python_version_tuple()[:2]),
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
        "version of accelerate": accelerate.__version__,
        "version of hf_ouroboros": __version__,
        "source of hf_ouroboros": _source(),
        "torch's default dtype": str(torch.get_default_dtype()),
        "torch's float32 matmul precision": torch.get_float32_matmul_precision(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


@functools.cache
def _source() -> str:
    """A digest of this package's files: hosts may hold different commits of one version."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def options(args: TrainingArguments) -> dict[str, Any]:
    """The options that all processes need alike, and what follows from them."""
    found = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(args)}
    known = {k: v for k, v in found.items() if _is_ours(type(args), k)}
    return plain(options_to_compare(known)) | {"type of device": args.device.type, "world size": args.world_size}


def _is_ours(cls: type, name: str) -> bool:
    """Whether an option is Trainer's or this package's: what a script adds of its own is its own business."""
    ours = (base for base in cls.__mro__ if base.__module__.split(".")[0] in ("transformers", __name__.split(".")[0]))
    return any(name in getattr(base, "__dataclass_fields__", {}) for base in ours)


def model(model: nn.Module) -> dict[str, Any]:
    """Configuration and structure of a model, wherever its parameters are."""
    facts: dict[str, Any] = {"model class": type(model).__qualname__}
    config = _of(model, "config")
    if config is not None:
        described = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        described["attn_implementation"] = _of(config, "_attn_implementation")
        facts |= {f"config.{name}": plain(value) for name, value in described.items()}
    facts["parameters"] = {
        name: f"{list(p.shape)} {p.dtype}{'' if p.requires_grad else ' frozen'}" for name, p in model.named_parameters()
    }
    facts["buffers"] = {name: f"{list(b.shape)} {b.dtype}" for name, b in model.named_buffers()}
    facts |= {f"adapter {name}": options for name, options in adapter_options(model).items()}
    facts["dropout"] = {
        name: module.p for name, module in model.named_modules() if isinstance(module, nn.modules.dropout._DropoutNd)
    }
    return facts


def weights(model: nn.Module) -> dict[str, Any]:
    """A checksum of a few elements of every parameter that is held here; None for all others."""
    return {name: None if p.is_meta else _of_tensor(p) for name, p in model.named_parameters()}


@torch.no_grad()
def _of_tensor(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return f"{list(tensor.shape)} {tensor.dtype}"
    if is_own_kind(tensor):
        return " ".join(map(_of_tensor, tensors_of(tensor)))
    flat = tensor.detach().reshape(-1)
    chosen = flat[:: max(1, len(flat) // SAMPLES)][: SAMPLES + 1]
    return hashlib.sha256(repr(chosen.double().tolist()).encode()).hexdigest()[:12]


def plan(rows: Sequence[Any]) -> dict[str, Any]:
    """What each stage is."""
    return {"number of stages": len(rows)} | {f"stage {row.stage}": plain(row) for row in rows}


def optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Class and parameter groups of an optimizer, its parameters by their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    facts: dict[str, Any] = {
        "optimizer": type(optimizer).__qualname__,
        "parameter groups": len(optimizer.param_groups),
    }
    for index, group in enumerate(optimizer.param_groups):
        facts |= {f"{k} of parameter group {index}": plain(v) for k, v in group.items() if k != "params"}
        facts[f"parameters of group {index}"] = [names.get(id(p), "(not the model's)") for p in group["params"]]
    return facts


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """A learning rate scheduler that a script has given."""
    if scheduler is None:
        return {}
    state = {
        k: v for k, v in vars(scheduler).items() if k != "optimizer" and (not k.startswith("_") or k == "_milestones")
    }
    facts = {"scheduler": type(scheduler).__qualname__} | {f"scheduler's {k}": plain(v) for k, v in state.items()}
    for index, inner in enumerate(getattr(scheduler, "_schedulers", ())):  # one after the other, or multiplied
        facts |= {f"{name} ({index})": value for name, value in scheduler_facts(inner).items()}
    return facts


def stopping(callbacks: Sequence[Any]) -> dict[str, Any]:
    """When callbacks that end a run early do so."""
    return {
        f"early stopping {index}": [c.early_stopping_patience, c.early_stopping_threshold]
        for index, c in enumerate(callbacks)
    }


def data(loader: Any, dataset: Any, collator: Any = None) -> dict[str, Any]:
    """Which rows come in which order: lengths, seeds, samplers. Rows themselves are not looked at."""
    facts = {
        "data set": type(dataset).__qualname__,
        "length of the data set": _length(dataset),
        "columns of the data set": plain(_of(dataset, "column_names")),
        "batches": _length(loader),
        "padding token": plain(_of(_of(collator, "tokenizer"), "pad_token_id")),
    } | _parts("collator", collator)
    level, sampler = 0, _inner_sampler(loader)
    while sampler is not None and level < 8:
        facts |= _parts(f"sampler {level}", sampler)
        level, sampler = level + 1, _inner_sampler(sampler)
    return facts


def _inner_sampler(thing: Any) -> Any:
    found = _of(thing, "batch_sampler")
    return _of(thing, "sampler") if found is None else found


def _parts(name: str, thing: Any) -> dict[str, Any]:
    """What an object is, and the numbers and words that it holds."""
    facts: dict[str, Any] = {name: getattr(thing, "__qualname__", type(thing).__qualname__)}
    for key, value in vars(thing).items() if hasattr(thing, "__dict__") else ():
        if key in ("process_index", "rank", "local_rank"):
            continue  # replicas take different parts
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            value = sorted(value)  # Trainer makes lists of names from sets, whose order is another in every process
        if isinstance(value, (list, tuple)) and len(value) > SAMPLES:
            value = hashlib.sha256(repr(plain(value)).encode()).hexdigest()[:12]
        if isinstance(value, (bool, int, float, str, type(None), list, tuple, torch.Generator)):
            facts[f"{name}'s {key}"] = plain(value)
    return facts


def _of(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name, None)
    except Exception:  # a property of a foreign class may raise whatever it likes; it is no fact then
        return None


def _length(thing: Any) -> int | None:
    try:
        return len(thing)
    except TypeError:
        return None
