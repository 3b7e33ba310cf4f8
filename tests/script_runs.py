"""A script's own code under stock Trainer, the engine and the reference: what comes of it, or the error that refuses it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from trainer_helpers import ExactTrainer, differing, ouroboros, stock, tiny_model
from transformers import PreTrainedModel, Trainer

from hf_ouroboros import OuroborosError, OuroborosTrainer

EXACT = ("alone", "1f1b")  # equal to stock Trainer
DELAYED = ("lockstep", "pipelined")  # equal to the reference


def plain_model() -> PreTrainedModel:
    """Untied: the two sides of a tied matrix are added up in another order than stock Trainer's. No dropout."""
    return tiny_model(tied=False, dropout=0.0)


def nothing(trainer: Trainer) -> None:
    """What a script does that does nothing."""


class Script:
    """What a script does.

    Args:
        prepare: done to the trainer before `train()`.
        model: makes the model.
        mixin: class with methods of a Trainer subclass.
        options: fields of the arguments.
    """

    def __init__(
        self,
        prepare: Callable[[Trainer], Any] = nothing,
        model: Callable[[], PreTrainedModel] = plain_model,
        mixin: type | None = None,
        **options: Any,
    ):
        self.prepare, self.model, self.mixin = prepare, model, mixin
        self.options = {"max_steps": 3, "max_grad_norm": 0.0, "logging_strategy": "no"} | options

    def trainer(self, folder: Path, kind: str) -> Trainer:
        """The trainer: "stock", "alone" (one stage), or of three stages under a schedule."""
        given: dict[str, Any] = {"model": self.model()}
        base = ExactTrainer if kind == "stock" else OuroborosTrainer
        if self.mixin is not None:
            given["cls"] = type("OfScript", (self.mixin, base), {})
        if kind == "stock":
            options = {k: v for k, v in self.options.items() if k not in ("recompute", "device_map")}
            return stock(folder / "run", given, **options)
        alone = kind == "alone"
        where = {"num_stages": 1, "devices": ["cpu:0"]} if alone else {"num_stages": 3, "devices": ["cpu:0", "cpu:1"]}
        return ouroboros(folder / "run", given, **{"schedule": "pipelined" if alone else kind, **where, **self.options})

    def run(self, folder: Path, kind: str) -> dict[str, torch.Tensor] | OuroborosError:
        """Weights after training; or the refusal, which has to come before the first update."""
        torch.set_num_threads(1)
        trainer = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer = self.trainer(folder, kind)
                self.prepare(trainer)
                before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
                trainer.train()
        except OuroborosError as error:
            if trainer is not None:
                parameters = dict(trainer.model.named_parameters())
                assert all(torch.equal(before[name], value) for name, value in parameters.items())
            return error
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(
    folder: Path, script: Script, exact: Sequence[str] = ("1f1b",), delayed: Sequence[str] = ("pipelined",)
) -> None:
    """A script gives what stock Trainer, or the reference, gives.

    Args:
        folder: for outputs.
        script: the script.
        exact: kinds that are equal to stock Trainer.
        delayed: schedules that are equal to the reference.
    """
    for base, kinds in (("stock", exact), ("reference", delayed)):
        expected = script.run(folder, base) if kinds else {}
        assert isinstance(expected, dict), expected
        for kind in kinds:
            found = script.run(folder, kind)
            assert isinstance(found, dict), (kind, found)
            assert differing(expected, found) == [], kind


def assert_refused(folder: Path, script: Script, why: str, kinds: Sequence[str] = ("pipelined", "reference")) -> None:
    """A script is refused, in these words, before anything has changed."""
    for kind in kinds:
        found = script.run(folder, kind)
        assert isinstance(found, OuroborosError), kind
        assert why in str(found), (kind, str(found))
