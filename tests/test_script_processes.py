"""A script's own code where every stage has a process: the reference's numbers, or errors that all processes raise."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import ends_of, in_processes
from torch.nn.utils import parametrizations
from trainer_helpers import LENGTH, Rows, differing, ouroboros, split_options, tiny_model
from transformers import Trainer

from hf_ouroboros import OuroborosError, OuroborosTrainer


def hooks_and_noise(model: Any) -> None:
    """Before the trainer is made: hooks on parameters and modules, noise, a parametrized module."""
    parametrizations.spectral_norm(model.transformer.h[4].mlp.c_fc)
    model.transformer.h[0].mlp.c_proj.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    model.lm_head.weight.register_hook(lambda gradient: gradient + 1e-3 * torch.randn_like(gradient))
    model.transformer.h[3].ln_1.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))
    for layer in (1, 3):
        model.transformer.h[layer].mlp.register_forward_hook(
            lambda module, inputs, output: output + 0.1 * torch.randn_like(output) if module.training else None
        )
    model.transformer.register_forward_hook(
        lambda module, inputs, output: type(output)(last_hidden_state=output[0] * 0.5)
    )


class Crops(Rows):
    """Another piece of a row every time, drawn where the row is read: in a worker of the data loader."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = int(torch.randint(4, ()))
        return {key: value[start : start + LENGTH - 4] for key, value in super().__getitem__(index).items()}


class Penalty:
    """Adds the weights of the last stage."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        head = self.model.lm_head.weight
        return model(**inputs).loss + (0.1 * head.square().sum() if not head.is_meta else 0)


class Penalised(Penalty, OuroborosTrainer):
    """On ours."""


class Reads(OuroborosTrainer):
    """Takes a value from weights that are in another process."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        return model(**inputs).loss * (1 + self.model.transformer.h[0].mlp.c_fc.weight.norm().item())


REFUSED: dict[str, tuple[type, str, str]] = {
    "penalty": (Penalised, "pipelined", "the loss reaches the parameter lm_head.weight past the model's outputs"),
    "read": (Reads, "1f1b", "c_fc.weight, which is in another process"),
}


def changed(folder: Path, options: dict[str, Any]) -> Trainer:
    model = tiny_model(tied=False, dropout=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        hooks_and_noise(model)
    return ouroboros(folder, {"model": model}, max_steps=3, **options)


def cropped(folder: Path, options: dict[str, Any]) -> Trainer:
    given = {"model": tiny_model(tied=False), "train_dataset": Crops(18)}
    return ouroboros(folder, given, max_steps=2, dataloader_num_workers=1, **options)


SCRIPTS: dict[str, Callable[[Path, dict[str, Any]], Trainer]] = {"changed": changed, "cropped": cropped}


def outcome(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.is_meta}


def part(rank: int, folder: str) -> list[Any]:
    multiprocessing.current_process()._config["daemon"] = False  # so that it may have workers that load data
    found = [outcome(make(Path(folder) / name, {"num_stages": 2})) for name, make in SCRIPTS.items()]
    gc.collect()  # ends those workers, for which whoever waits for this process would wait, too
    return found


def refused_part(rank: int, folder: str, case: str) -> None:
    """Writes down what it says when it refuses, or is told of the other one's refusal."""
    cls, schedule, _ = REFUSED[case]
    try:
        given = {"model": tiny_model(tied=False), "cls": cls}
        outcome(ouroboros(Path(folder) / "out", given, max_steps=2, num_stages=2, schedule=schedule))
    except OuroborosError as error:
        Path(folder, f"{rank}.txt").write_text(str(error), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_named_by_all_processes(case: str, tmp_path: Path) -> None:
    """Also by one that waits for the other, at a log for instance."""
    ends_of(2, refused_part, str(tmp_path), case)
    for rank in range(2):
        text = (tmp_path / f"{rank}.txt").read_text(encoding="utf-8")
        assert REFUSED[case][2] in text


@pytest.mark.slow
def test_the_reference_s_numbers(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    parts = in_processes(2, part, str(tmp_path / "processes"))
    for index, (name, make) in enumerate(SCRIPTS.items()):
        expected = outcome(make(tmp_path / name, {"schedule": "reference", **split_options(2, 2)}))
        found = {key: value for every in parts for key, value in every[index].items()}
        assert differing(expected, found) == [], name
