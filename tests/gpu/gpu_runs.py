"""Runs on accelerators: which devices there are, small models for them, and complete runs."""

from __future__ import annotations

from typing import Any

import torch
from trainer_helpers import Rows, common_options, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PrinterCallback

from hf_ouroboros import OuroborosArguments, OuroborosTrainer

KIND = next((k for k in ("cuda", "xpu") if torch.get_device_module(k).is_available()), None)
COUNT = torch.get_device_module(KIND).device_count() if KIND else 0


def workers(count: int) -> list[str]:
    """Names of so many devices: the machine's accelerators in turn, shared by several workers where there are too few."""
    return [f"{KIND}:{i}" if count <= COUNT else f"{KIND}:{i % COUNT}/{i // COUNT}" for i in range(count)]


def tiny_llama(tied: bool, layers: int = 5) -> PreTrainedModel:
    """A Llama of some thousand parameters, always with the same weights."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attention_dropout=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


MODELS = {
    "gpt2": lambda: tiny_model(),
    "llama": lambda: tiny_llama(tied=False),
    "llama-tied": lambda: tiny_llama(tied=True),
}


def run(
    folder: Any, model: str | PreTrainedModel = "gpt2", stages: int = 3, resume: Any = None, **options: Any
) -> OuroborosTrainer:
    """A complete training run on accelerators, of two epochs of 5 micro-batches with a ragged end.

    Args:
        folder: where it writes.
        model: one of `MODELS`, or a model.
        stages: K, on as many workers unless `devices` says otherwise.
        resume: checkpoint to go on from.
        options: fields of OuroborosArguments; `rows` for the data, `cls` for a subclass.
    """
    rows, cls = options.pop("rows", None) or Rows(18), options.pop("cls", OuroborosTrainer)
    given = common_options(folder, **({"num_stages": stages, "devices": workers(stages), "use_cpu": False} | options))
    trainer = cls(
        model=MODELS[model]() if isinstance(model, str) else model,
        args=OuroborosArguments(**given),
        train_dataset=rows,
        eval_dataset=Rows(10, seed=1),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def distance(expected: OuroborosTrainer, found: OuroborosTrainer) -> float:
    """Largest difference of a weight, in units of the largest weight of its tensor."""
    weights = found.model.state_dict()
    return max(
        float((value.float().cpu() - weights[name].float().cpu()).abs().max() / value.float().abs().max().cpu())
        for name, value in expected.model.state_dict().items()
        if value.is_floating_point() and value.numel() > 1
    )
