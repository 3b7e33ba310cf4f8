"""How much a process grows while it makes its stages and trains them, over what it was before."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
from adapters import with_lora
from transformers import PreTrainedModel, PrinterCallback, set_seed

from hf_ouroboros import AutoStagedModelForCausalLM, OuroborosArguments, OuroborosTrainer
from hf_ouroboros.memory_use import peak_memory, reset_peak

from .job import Job, common_arguments
from .measure import gather
from .text import Blocks
from .trainers import arguments_of

SMALL = {"n_embd": 64, "batch_size": 1, "block_size": 16}
"""What does not grow with the model (pages of libraries, buffers of connections) is paid for by a run with these."""


class WeighedTrainer(OuroborosTrainer):
    """Takes note of the memory that training took, before what is pending is computed at the end."""

    trained = 0

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.synchronize()
        self.trained = peak_memory().peak_resident or 0
        return super()._finalize_training(*args, **kwargs)


def run(job: Job, world_size: int, dtype: str) -> dict[str, Any]:
    """Bytes by which every process has grown at most, in training and with the end of the run, and its parameters.

    Args:
        job: what is trained.
        world_size: how many processes there are.
        dtype: of the weights, "float32" or "bfloat16".
    """
    _train(replace(job, options=replace(job.options, **SMALL)), dtype)
    gc.collect()
    reset_peak()
    before = peak_memory().resident or 0
    trainer = _train(job, dtype)
    own = [p for p in trainer.model.parameters() if not p.is_meta]
    return {
        "training": gather(trainer.trained - before),
        "with the end": gather((peak_memory().peak_resident or 0) - before),
        "parameters": gather(sum(p.numel() for p in own)),
    }


def _train(job: Job, dtype: str) -> WeighedTrainer:
    options = job.options
    given = common_arguments(job) | {"schedule": job.contender.kind, "device_map": options.device_map}
    arguments = arguments_of(OuroborosArguments, given, job.contender.settings)
    trainer = WeighedTrainer(_model(job, arguments, dtype), arguments, train_dataset=_rows(job))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _model(job: Job, arguments: OuroborosArguments, dtype: str) -> PreTrainedModel:
    """The stages of this process; the others never have memory here."""
    set_seed(job.seed)
    model = AutoStagedModelForCausalLM.from_config(job.options.config(), args=arguments, dtype=getattr(torch, dtype))
    return model if job.options.lora_rank is None else with_lora(model, job.options.lora_rank)


def _rows(job: Job) -> Blocks:
    """As many random rows as the run needs."""
    options, generator = job.options, torch.Generator().manual_seed(job.seed)
    return Blocks(
        torch.randint(options.vocab_size, (job.updates * options.global_batch, options.block_size), generator=generator)
    )
