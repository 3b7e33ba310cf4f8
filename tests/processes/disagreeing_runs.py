"""Runs over processes in which one of them is given something else, and what all of them say about it."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from trainer_helpers import Rows, ouroboros, tiny_model
from transformers import EarlyStoppingCallback, get_linear_schedule_with_warmup

from hf_ouroboros import OuroborosError
from hf_ouroboros.processes import run_digest

# name of the option -> a value that is not the default of these runs
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "num_train_epochs": 3,
    "max_steps": 4,
    "learning_rate": 3e-2,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"last_epoch": -1},
    "warmup_steps": 2,
    "optim": "sgd",
    "optim_args": "eps=1e-6",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "optim_target_modules": "all-linear",
    "gradient_accumulation_steps": 3,
    "average_tokens_across_devices": False,
    "max_grad_norm": 0.5,
    "label_smoothing_factor": 0.1,
    "bf16": True,
    "use_cache": True,
    "logging_strategy": "epoch",
    "logging_steps": 2,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "all",
    "eval_strategy": "epoch",
    "eval_steps": 3,
    "eval_delay": 2,
    "per_device_eval_batch_size": 3,
    "prediction_loss_only": True,
    "eval_on_start": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "save_only_model": True,
    "save_strategy": "epoch",
    "save_steps": 7,
    "save_total_limit": 2,
    "enable_jit_checkpoint": True,
    "hub_private_repo": True,
    "hub_model_id": "other/name",
    "hub_strategy": "end",
    "hub_always_push": True,
    "hub_revision": "other",
    "metric_for_best_model": "accuracy",
    "greater_is_better": True,
    "ignore_data_skip": True,
    "restore_callback_states_from_checkpoint": True,
    "full_determinism": True,
    "seed": 6,
    "data_seed": 7,
    "accelerator_config": {"even_batches": False},
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_in_order": False,
    "remove_unused_columns": False,
    "label_names": ["targets"],
    "train_sampling_strategy": "sequential",
    "length_column_name": "size",
    "ddp_timeout": 50,
    "schedule": "lockstep",
    "num_stages": 5,
    "device_map": [1, 2, 2],
    "max_memory": '{"0": "1GB"}',
    "clip_scope": "global",
    "delay_warmup_steps": 1,
    "delay_compensation": "error_feedback",
    "eval_mem_len": 4,
    "eval_clamp_len": 4,
    "recompute": True,
    "weights": "now",
    "fused_head": "on",
    "timeline": "somewhere",
}
# what an option needs besides, in all processes
ALONG: dict[str, dict[str, Any]] = {
    "clip_scope": {"schedule": "lockstep"},
    "delay_compensation_args": {"delay_compensation": "nesterov"},
}
OPTIONS["tied_gradient"], ALONG["tied_gradient"] = "paper", {"schedule": "lockstep"}
OPTIONS["delay_compensation_args"] = "beta1=0.95"


def loss_a(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss of the script's own."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_b(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Another one."""
    return loss_a(outputs, labels)


def _model(change: Callable[[Any], None] = lambda model: None, **options: Any) -> dict[str, Any]:
    model = tiny_model(**options)
    change(model)
    return {"model": model}


def _optimizer(make: Callable[..., Any], schedule: Any = None, names: Any = None, **options: Any) -> dict[str, Any]:
    model = tiny_model()
    chosen = [p for n, p in model.named_parameters() if names is None or names in n]
    optimizer = make(chosen, **options)
    return {"model": model, "optimizers": (optimizer, None if schedule is None else schedule(optimizer))}


def _thaw(pattern: str) -> Callable[[Any], None]:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(pattern not in name)

    return freeze


def _perturb(model: Any) -> None:
    with torch.no_grad():
        model.transformer.ln_f.weight += 0.01


def _drop(model: Any) -> None:
    model.transformer.drop.p = 0.3


warmed = functools.partial(functools.partial, get_linear_schedule_with_warmup, num_training_steps=6)
SGD, ADAM = torch.optim.SGD, torch.optim.AdamW
# what is different -> (words of the error, what most are given, what the odd one is given)
GIVEN: dict[str, tuple[str, Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]] = {
    "dropout": ("config.resid_pdrop is", _model, lambda: _model(dropout=0.2)),
    "dropout of a module": ("dropout is", _model, lambda: _model(_drop)),
    "layers": ("config.n_layer is", _model, lambda: _model(layers=4)),
    "tied": ("config.tie_word_embeddings is", _model, lambda: _model(tied=False)),
    "frozen": ("parameters is", _model, lambda: _model(_thaw("ln_f"))),
    "weights": ("transformer.ln_f.weight is", _model, lambda: _model(_perturb)),
    "dtype": ("parameters is", _model, lambda: _model(lambda m: m.double())),
    "optimizer": ("optimizer is", lambda: _optimizer(SGD, lr=0.1), lambda: _optimizer(ADAM, lr=0.1)),
    "rate": ("lr of parameter group 0 is", lambda: _optimizer(SGD, lr=0.1), lambda: _optimizer(SGD, lr=0.2)),
    "decay": (
        "weight_decay of parameter group 0 is",
        lambda: _optimizer(ADAM),
        lambda: _optimizer(ADAM, weight_decay=0.1),
    ),
    "betas": ("betas of parameter group 0 is", lambda: _optimizer(ADAM), lambda: _optimizer(ADAM, betas=(0.8, 0.9))),
    "members": (
        "parameters of group 0 is",
        lambda: _optimizer(SGD, lr=0.1),
        lambda: _optimizer(SGD, None, "h.", lr=0.1),
    ),
    "scheduler": (
        "scheduler's lr_lambdas is",
        lambda: _optimizer(SGD, warmed(num_warmup_steps=2), lr=0.1),
        lambda: _optimizer(SGD, warmed(num_warmup_steps=3), lr=0.1),
    ),
    "rows": ("length of the data set is", dict, lambda: {"train_dataset": Rows(17)}),
    "loss": (
        'compute_loss_func is "loss_',
        lambda: {"compute_loss_func": loss_a},
        lambda: {"compute_loss_func": loss_b},
    ),
    "stopping": (
        "early stopping 0 is",
        lambda: {"callbacks": [EarlyStoppingCallback(2)]},
        lambda: {"callbacks": [EarlyStoppingCallback(3)]},
    ),
}
# what is different of the software -> (words of the error, owner, attribute, value)
SOFTWARE: dict[str, tuple[str, Any, str, Any]] = {
    "python": ("version of python is", run_digest.platform, "python_version_tuple", lambda: ("3", "9", "1")),
    "torch": ("version of torch is", torch, "__version__", "2.0.1"),
    "transformers": ("version of transformers is", transformers, "__version__", "5.0.0"),
    "accelerate": ("version of accelerate is", run_digest.accelerate, "__version__", "1.0.0"),
    "hf_ouroboros": ("version of hf_ouroboros is", run_digest, "__version__", "0.0.1"),
    "source": ("source of hf_ouroboros is", run_digest, "_source", lambda: "another"),
}
Outcome = tuple[str, str, float]
"""Class of the error, its text, and seconds until it came; ("", "", seconds) where there was none."""


def outcome(run: Callable[[], Any]) -> Outcome:
    """How a run ends."""
    start = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run()
    except OuroborosError as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def disagreeing(rank: int, folder: str, cases: list[tuple[str, str]], odd: int) -> list[Outcome]:
    """How a process's runs end, in each of which the odd process is given something else."""
    return [outcome(lambda case=case: _run(rank == odd, folder, *case)) for case in cases]


def _run(odd: bool, folder: str, kind: str, name: str) -> None:
    common = {"num_stages": int(os.environ["WORLD_SIZE"]) + 1, "ddp_timeout": 40}
    if kind == "option":
        own = common | ALONG.get(name, {}) | ({name: OPTIONS[name]} if odd else {})
        ouroboros(folder, **own).train()
    elif kind == "given":
        ouroboros(folder, GIVEN[name][1 + odd](), **common).train()
    else:
        _, owner, attribute, value = SOFTWARE[name]
        before = getattr(owner, attribute)
        try:
            if odd:
                setattr(owner, attribute, value)
            ouroboros(folder, **common).train()
        finally:
            setattr(owner, attribute, before)


ALL = [("option", n) for n in OPTIONS] + [("given", n) for n in GIVEN] + [("software", n) for n in SOFTWARE]


def words(kind: str, name: str) -> str:
    """What the error has to say."""
    return f"{name} is" if kind == "option" else (GIVEN if kind == "given" else SOFTWARE)[name][0]
