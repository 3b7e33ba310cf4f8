"""Adapters on tiny models: one configuration of every kind, and models wrapped with them, always with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import tiny_decoder
from trainer_helpers import tiny_model
from transformers import PreTrainedModel

peft = pytest.importorskip("peft", reason="needs the extra `peft`: pip install -e '.[peft]'")

GPT2 = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}

# name -> model type, options of the model, configuration of the adapter, its options
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "lora on gpt2": ("gpt2", {}, "LoraConfig", {"r": 4, **GPT2}),
    "lora on llama": ("llama", {}, "LoraConfig", {"r": 4, **LLAMA}),
    "lora on qwen3": ("qwen3", {"tie_word_embeddings": True}, "LoraConfig", {"r": 4, "target_modules": "all-linear"}),
    "lora on gemma3": ("gemma3_text", {}, "LoraConfig", {"r": 4, **LLAMA}),
    "rslora": ("llama", {}, "LoraConfig", {"r": 4, "use_rslora": True, **LLAMA}),
    "dora": ("llama", {}, "LoraConfig", {"r": 4, "use_dora": True, **LLAMA}),
    "biases": ("gpt2", {}, "LoraConfig", {"r": 4, "bias": "all", **GPT2}),
    "embedding": ("gpt2", {}, "LoraConfig", {"r": 4, **GPT2, "target_modules": ["wte", "c_attn"]}),
    "head": ("gpt2", {"tied": False}, "LoraConfig", {"r": 4, "target_modules": ["lm_head", "c_attn"]}),
    "ia3": (
        "gpt2",
        {},
        "IA3Config",
        {**GPT2, "target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    ),
    "vera": ("llama", {}, "VeraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "norms": ("gpt2", {}, "LNTuningConfig", {"target_modules": ["ln_1", "ln_f"]}),
    "modules_to_save": ("gpt2", {}, "LoraConfig", {"r": 4, **GPT2, "modules_to_save": ["lm_head", "ln_f"]}),
    "embedding to save": ("llama", {}, "LoraConfig", {"r": 4, **LLAMA, "modules_to_save": ["embed_tokens"]}),
    "tokens": ("gpt2", {}, "TrainableTokensConfig", {"token_indices": [1, 5, 7], "target_modules": ["wte"]}),
    "lora and tokens": ("gpt2", {}, "LoraConfig", {"r": 4, **GPT2, "trainable_token_indices": [2, 3]}),
    "parameters": ("gpt2", {}, "LoraConfig", {"r": 4, "target_modules": [], "target_parameters": ["mlp.c_fc.weight"]}),
    "experts": (
        "mixtral",
        {},
        "LoraConfig",
        {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "last layers": ("llama", {}, "LoraConfig", {"r": 4, **LLAMA, "layers_to_transform": [2]}),
    "loha": ("llama", {}, "LoHaConfig", {"r": 4, **LLAMA}),
    "lokr": ("llama", {}, "LoKrConfig", {"r": 4, **LLAMA}),
    "oft": ("llama", {}, "OFTConfig", {"oft_block_size": 4, **LLAMA}),
    "hra": ("llama", {}, "HRAConfig", {"r": 4, **LLAMA}),
    "miss": ("llama", {}, "MissConfig", {"r": 4, **LLAMA}),
    "fourier": ("gpt2", {}, "FourierFTConfig", {"n_frequency": 20, "target_modules": ["c_attn"]}),
}


def base(case: str) -> PreTrainedModel:
    """The model without its adapter."""
    kind, options = CASES[case][:2]
    if kind == "gpt2":
        return tiny_model(**{"dropout": 0.0, "layers": 4, **options})
    return tiny_decoder(kind, **({"num_hidden_layers": 3} if kind in ("llama", "mixtral") else {}), **options)


def config(case: str, **options: Any) -> Any:
    """The configuration of its adapter."""
    name, own = CASES[case][2:]
    return getattr(peft, name)(**{**own, "task_type": "CAUSAL_LM", **options})


def saved(case: str, folder: Path) -> Path:
    """The model without its adapter, in a folder."""
    if not folder.exists():
        base(case).save_pretrained(folder)
    return folder


def adapted(model: Any, case: str, **options: Any) -> Any:
    """A model with its adapter, none of whose parameters are as they were initialised: LoRA's B is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config(case, **options))
    stir(model, torch.Generator().manual_seed(1))
    return model


def wrapped(case: str, **options: Any) -> Any:
    """The model with its adapter."""
    return adapted(base(case), case, **options)


@torch.no_grad()
def stir(model: Any, generator: torch.Generator) -> None:
    """Adds noise to everything that is trained."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """Copies of what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
