"""A PeftModel from outside: the model inside it, whose layers are split, and the adapters that stages can't reproduce.

PEFT puts its layers into the places of the modules they adapt, so a stage that runs the base model's forward runs the
adapters as well. What the wrapper itself does around that forward (virtual tokens, a second forward) is not there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError, UnsupportedOptionError
from ..partition.ownership import names_of_parameters

# Compared with the reference, with stock Trainer and after reloading by tests/adapters.
TRAINED = ("LORA", "IA3", "VERA", "LN_TUNING", "TRAINABLE_TOKENS", "LOHA", "LOKR", "OFT", "HRA", "MISS", "FOURIERFT")

REASONS = {
    "ADALORA": "changes its ranks during the run, by gradients of all layers at one moment, and adds to the loss what only "
    "the wrapper computes",
    "XLORA": "mixes adapters by a forward through the whole model that comes before the real one",
    "ADAPTION_PROMPT": "puts virtual tokens into the attention of the whole model's forward",
    "OSF": "changes gradients by hooks that look at the weights of now",
}
INPUT_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")
"""What Transformers and PEFT call the hook."""
USE = "use an adapter inside the layers, such as LoraConfig"


def is_adapted(model: Any) -> bool:
    """Whether a model is wrapped by PEFT."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftMixedModel, PeftModel

    return isinstance(model, (PeftModel, PeftMixedModel))


def base_of(model: Any) -> Any:
    """The Transformers model inside a wrapper of PEFT; any other model is returned as it is."""
    if not is_adapted(model):
        return model
    return model.get_base_model() if hasattr(model, "get_base_model") else model.base_model.model


def check_adapters(model: Any, processes: bool = False) -> None:
    """Refuses adapters that are more than modules inside the layers.

    Args:
        model: wrapped by PEFT, or any other.
        processes: whether several processes hold the stages.

    Raises:
        UnsupportedModelError: names the adapter, and why.
    """
    if not is_adapted(model):
        if processes and "peft" in sys.modules and _has_tuner_layers(model):
            raise UnsupportedModelError(
                f"this {type(model).__name__} has adapters, but no PeftModel around it (inject_adapter_in_model, "
                "add_adapter), so that processes could not save them as adapters; use get_peft_model(model, config)"
            )
        return
    if not hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            "a PeftMixedModel can't be saved by PEFT; use get_peft_model(model, config) without mixed=True"
        )
    for name, config in model.peft_config.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if why := _refusal(kind, config):
            raise UnsupportedModelError(f"the adapter {name!r} ({kind}) {why}, which stages can't reproduce; {USE}")
    _check_tied(model)
    _without_input_gradients(base_of(model))


def lora_on_meta(model: Any, rank: int) -> Any:
    """A model without memory, with LoRA adapters of a rank on all linear modules of its layers; the rest is frozen.

    Raises:
        UnsupportedOptionError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UnsupportedOptionError(f"lora_rank={rank} needs PEFT: pip install 'hf_ouroboros[peft]'") from None
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear")).get_base_model()


def _refusal(kind: str, config: Any) -> str | None:
    if getattr(config, "is_prompt_learning", False):
        return "puts virtual tokens in front of the whole model"
    if getattr(config, "alora_invocation_tokens", None) is not None:
        return "begins behind certain tokens (alora_invocation_tokens), for which the wrapper's forward looks"
    if kind in REASONS:
        return REASONS[kind]
    return None if kind in TRAINED else f"is none of the kinds that were compared ({', '.join(TRAINED)})"


def _check_tied(model: Any) -> None:
    """Refuses adapters on both sides of a tied matrix: saved and merged, they would contradict each other."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    base = base_of(model)
    tokens = [name for name, module in base.named_modules() if isinstance(module, TrainableTokensLayer)]
    for _, names in names_of_parameters(base):
        adapted = [name for name in names if ".base_layer." in f".{name}" or ".original_module." in f".{name}"]
        # PEFT ties the rows of tied matrices that it trains.
        if len(adapted) > 1 and any(not name.startswith(tuple(f"{t}." for t in tokens)) for name in adapted):
            raise UnsupportedModelError(
                f"{adapted[0]} and {adapted[1]} are one matrix (tied embeddings) with an adapter on either side, which PEFT "
                "can't save or merge; adapt one of them, or untie the model first (config.tie_word_embeddings=False)"
            )


def _without_input_gradients(base: nn.Module) -> None:
    """Takes away the hooks by which embeddings that are frozen put out what needs a gradient.

    Gradient checkpointing of other trainers starts from there (`enable_input_require_grads`); stages recompute without.
    """
    for module in base.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in INPUT_GRADIENTS:
                del module._forward_hooks[key]


def _has_tuner_layers(model: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())
