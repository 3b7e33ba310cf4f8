"""Tiny models, data and runs for the tests of the trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_ouroboros import OuroborosArguments, OuroborosTrainer

VOCABULARY = 61
LENGTH = 10
TRANSFORMERS = Version(transformers.__version__)
TESTS = Path(__file__).parent
EVERY = bool(os.environ.get("HF_OUROBOROS_EVERY_CASE"))
"""Whether tests run all of their cases, also those that differ little from others."""


def tiny_model(tied: bool = True, dropout: float = 0.1, layers: int = 5) -> GPT2LMHeadModel:
    """Always the same weights; random numbers outside go on as if nothing had happened."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=layers,
        n_head=2,
        n_positions=32,
        tie_word_embeddings=tied,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


class Rows(Dataset):
    """Random token rows; every third one is padded to the right by another length."""

    def __init__(self, count: int, seed: int = 0, masks: bool = True):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
        self.masks = masks

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        labels, mask = ids.clone(), torch.ones_like(ids)
        if index % 3 == 0:
            stop = 4 + index % 5
            labels[stop:], mask[stop:] = -100, 0
        return {"input_ids": ids, "labels": labels} | ({"attention_mask": mask} if self.masks else {})


def split_options(stages: int, devices: int) -> dict[str, Any]:
    """Options for K stages on so many devices."""
    return {"num_stages": stages, "devices": [f"cpu:{i}" for i in range(devices)]}


def common_options(output_dir: Any, **options: Any) -> dict[str, Any]:
    """Options of a short run: two epochs with a ragged end, everything logged."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    return defaults | options


def ouroboros(output_dir: Any, trainer: dict[str, Any] | None = None, **options: Any) -> OuroborosTrainer:
    """A trainer on the tiny model and 18 rows: 5 micro-batches an epoch.

    Args:
        trainer: arguments of OuroborosTrainer; `cls` for a subclass.
        options: fields of OuroborosArguments.
    """
    given = {"train_dataset": Rows(18), "eval_dataset": Rows(10, seed=1)} | (trainer or {})
    cls = given.pop("cls", OuroborosTrainer)
    if "model" not in given and "model_init" not in given:
        given["model"] = tiny_model()
    made = cls(args=OuroborosArguments(**common_options(output_dir, **options)), **given)
    made.remove_callback(PrinterCallback)
    return made


def trained(
    output_dir: Any, trainer: dict[str, Any] | None = None, resume: Any = None, **options: Any
) -> OuroborosTrainer:
    """`ouroboros`, after its `train()`."""
    made = ouroboros(output_dir, trainer, **options)
    made.train(resume_from_checkpoint=None if resume is None else str(resume) if resume is not True else True)
    return made


class ExactTrainer(Trainer):
    """The stock Trainer, with the number of target tokens right also before transformers 5.14."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Early 5.x releases let accelerate divide each loss by the micro-batches once more. All accelerators of a
        # process share this number.
        self.accelerator.gradient_accumulation_steps = 1
        return super().training_step(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        if not batch_samples:
            return None
        first = 0 if getattr(self.model.config, "is_encoder_decoder", False) else 1
        return sum(batch["labels"][..., first:].ne(-100).sum() for batch in batch_samples).to(device)


def stock(output_dir: Any, trainer: dict[str, Any] | None = None, **options: Any) -> Trainer:
    """The stock Trainer on the same model and data."""
    given = {"train_dataset": Rows(18), "eval_dataset": Rows(10, seed=1)} | (trainer or {})
    cls = given.pop("cls", ExactTrainer)
    if "model" not in given and "model_init" not in given:
        given["model"] = tiny_model(dropout=0.0)
    if "model" in given and not given["model"].config.is_encoder_decoder:
        given["model"].loss_type = "ForCausalLM"
    made = cls(args=TrainingArguments(**common_options(output_dir, **options)), **given)
    made.remove_callback(PrinterCallback)
    return made


def logged(trainer: Trainer, key: str) -> list[Any]:
    """All values of a key in the log history."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def outcome(trainer: Trainer) -> dict[str, Any]:
    """Everything that a run leaves behind, copied."""
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "optimizer": copied(complete_optimizer(trainer).state_dict()),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "step": trainer.state.global_step,
        "epoch": trainer.state.epoch,
    }


def complete_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper and the staged face."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def copied(value: Any) -> Any:
    """A deep copy of nested dicts and lists of tensors."""
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def differing(expected: Any, found: Any, path: str = "") -> list[str]:
    """Where two nested structures differ, to the last bit."""
    if torch.is_tensor(expected) and torch.is_tensor(found):
        return [] if torch.equal(expected, found) else [path]
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        if expected.keys() != found.keys():
            return [f"{path}: keys {set(expected) ^ set(found)}"]
        return [d for key in expected for d in differing(expected[key], found[key], f"{path}/{key}")]
    if isinstance(expected, Sequence) and isinstance(found, Sequence) and not isinstance(expected, str):
        if len(expected) != len(found):
            return [f"{path}: {len(expected)} and {len(found)} items"]
        return [d for i, (a, b) in enumerate(zip(expected, found, strict=True)) for d in differing(a, b, f"{path}/{i}")]
    return [] if expected == found else [f"{path}: {expected} and {found}"]


def assert_same(expected: Trainer | dict[str, Any], found: Trainer | dict[str, Any]) -> None:
    """Weights, optimizer and scheduler of two runs are equal to the last bit."""
    expected = expected if isinstance(expected, dict) else outcome(expected)
    found = found if isinstance(found, dict) else outcome(found)
    assert differing(expected, found) == []


class AtStep(TrainerCallback):
    """Does something at the end of a step.

    Args:
        step: the global step; None for every step.
        action: gets nothing.
    """

    def __init__(self, step: int | None, action: Any):
        self.step = step
        self.action = action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step in (None, state.global_step):
            self.action()


def run_python(code: str, *arguments: Any, timeout: float = 120) -> subprocess.CompletedProcess:
    """Code in a process of its own that can import these helpers."""
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
