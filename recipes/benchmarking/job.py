"""One run of one contender: what it trains, and with which arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapters import with_lora
from architectures import without_dropout
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments, set_seed

from hf_ouroboros import split_model
from hf_ouroboros.models.transfo_xl import TransfoXLLMHeadModel
from hf_ouroboros.optim.matrices import hidden_matrices
from hf_ouroboros.optim.muon import Muon

from .contenders import Contender
from .options import BenchmarkArguments


@dataclass(frozen=True)
class Job:
    """What the processes of one run are told.

    Args:
        options: the benchmark's.
        contender: who runs.
        seed: of weights and order of the text.
        data: file of `write_blocks`.
        folder: where results, messages and timelines go.
        updates: how many, at most.
        target: end at the first evaluation with this validation loss; None to run all updates and evaluate at the end.
        evaluate: whether to evaluate every `options.eval_every` updates.
    """

    options: BenchmarkArguments
    contender: Contender
    seed: int
    data: Path
    folder: Path
    updates: int
    target: float | None = None
    evaluate: bool = False

    @property
    def rows_per_micro_batch(self) -> int:
        """Rows of a micro-batch of this contender."""
        return self.options.global_batch // self.contender.micro_batches


def muon_matrices(model: PreTrainedModel) -> list[str]:
    """Names of the matrices that Muon steps, in every contender those that it steps in ours."""
    stages = split_model(model, ["cpu:0"], check=False).stages  # only a split: no weight moves
    # Some biases have two dimensions.
    decayed = [name for name, _ in model.named_parameters() if not name.endswith("bias")]
    found = {id(parameter) for parameter in hidden_matrices(stages, decayed)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in found]


def muon(
    arguments: TrainingArguments, model: PreTrainedModel, names: list[str]
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and arguments of Muon with AdamW, for the matrices of these names."""
    named = dict(model.named_parameters())
    return Muon().optimizer(arguments, [named[name] for name in names])


def build_model(job: Job) -> PreTrainedModel:
    """The same model for every contender, without dropout."""
    options = job.options
    set_seed(job.seed)
    if options.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(options.model_name_or_path)
        for name, value in without_dropout(config).items():
            setattr(config, name, value)
        model = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, config=config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(options.config())
    model.loss_type = "ForCausalLM"  # otherwise Trainer counts one label too many per row
    return model if options.lora_rank is None else with_lora(model, options.lora_rank)


def tables(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The modules whose `weight` is the input and the output embedding, [vocabulary, width]."""
    if isinstance(model, TransfoXLLMHeadModel):
        return model.transformer.word_emb.emb_layers[0], model.crit.out_layers[0]
    return model.get_input_embeddings(), model.get_output_embeddings()


def common_arguments(job: Job) -> dict[str, Any]:
    """Options of TrainingArguments that all contenders share; the contender's own settings come on top."""
    options = job.options
    return {
        "output_dir": str(job.folder / "scratch"),
        "per_device_train_batch_size": job.rows_per_micro_batch,
        "per_device_eval_batch_size": job.rows_per_micro_batch,
        "gradient_accumulation_steps": job.contender.micro_batches,
        "max_steps": job.updates,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.lr_scheduler_type,
        "warmup_steps": options.warmup_updates,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": options.on_cpu,
        "disable_tqdm": True,
        "seed": job.seed,
    }
