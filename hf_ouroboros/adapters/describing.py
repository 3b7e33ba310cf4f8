"""What a run with adapters depends on besides its checkpoint: the adapters' options, and the frozen weights below them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CheckpointMismatchError
from ..partition.packed import packed_linears, values
from .wrapping import is_adapted

SAMPLES = 16
# Where the base model was, and what says nothing about the computation.
NOT_COMPARED = frozenset({"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"})


def adapter_options(model: Any) -> dict[str, dict[str, str]]:
    """The options of every adapter, and which are active; empty for a model without."""
    if not is_adapted(model):
        return {}
    found = {
        name: {key: _words(value) for key, value in config.to_dict().items() if key not in NOT_COMPARED}
        for name, config in model.peft_config.items()
    }
    active = {"active": _words(list(model.active_adapters))}
    return {name: {**options, **active} for name, options in found.items()}


@torch.no_grad()
def frozen_digests(model: Any) -> dict[str, str]:
    """A digest of a few elements of every frozen parameter that is here; empty for a model without adapters."""
    if not is_adapted(model):
        return {}
    found = {}
    packed = {id(module.weight): values(module) for _, module in packed_linears(model)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not parameter.is_meta:
            digest = hashlib.sha256()
            for tensor in packed.get(id(parameter), [parameter.detach()]):
                flat = tensor.reshape(-1)
                digest.update(flat[:: max(1, len(flat) // SAMPLES)].double().cpu().numpy().tobytes())
            found[name] = digest.hexdigest()[:12]
    return found


def check_base(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuses the checkpoint of adapters with other options, or on other frozen weights.

    Raises:
        CheckpointMismatchError: names what differs.
    """
    before, now = saved.get("adapters", {}), here.get("adapters", {})
    if before.keys() != now.keys():
        raise CheckpointMismatchError(
            f"the checkpoint was written with the adapters {sorted(before)}, this run has {sorted(now)}; resume with the same"
        )
    for name in before:
        for key in sorted(before[name].keys() & now[name].keys()):
            if before[name][key] != now[name][key]:
                raise CheckpointMismatchError(
                    f"{key} of the adapter {name!r} was {before[name][key]} when the checkpoint was written, and is "
                    f"{now[name][key]}; resume with the same"
                )
    for name, digest in saved.get("frozen", {}).items():
        if here.get("frozen", {}).get(name, digest) != digest:
            raise CheckpointMismatchError(
                f"the frozen weights are not those that the checkpoint's adapters were trained on: {name} differs; load the "
                "same base model"
            )


def _words(value: Any) -> str:
    """The same words for equal options, also for sets, which have no order."""
    if isinstance(value, (set, frozenset)):
        value = sorted(map(str, value))
    return str(getattr(value, "value", value))
