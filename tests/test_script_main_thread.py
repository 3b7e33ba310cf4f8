"""A script's code in the main thread besides callbacks: it finds the pipeline at rest where it touches the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from script_runs import Script, assert_equal, assert_refused
from torch import nn
from trainer_helpers import differing, tiny_model
from transformers import Trainer, TrainerCallback

from hf_ouroboros import UnsupportedOptionError

EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}
SAVES = {"save_strategy": "steps", "save_steps": 1}


def weight(trainer: Any) -> nn.Parameter:
    return trainer.model.transformer.h[0].mlp.c_fc.weight


def written(trainer: Any, factor: float = 0.97) -> None:
    with torch.no_grad():
        weight(trainer).mul_(factor)


def by_weights(trainer: Any, inputs: Any) -> Any:
    """Labels moved by what the weights are now, to the last digits."""
    places = int(weight(trainer).detach().abs().sum().item() * 1e4) % 3
    return {**inputs, "labels": inputs["labels"].roll(places, 0)}


class Inputs:
    """Inputs are made of weights."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        return by_weights(self, super()._prepare_inputs(inputs))


class Log:
    """Reads and writes where it logs."""

    def log(self, logs: Any, *args: Any, **kwargs: Any) -> None:
        """See `Trainer.log`."""
        with torch.no_grad():
            self.model.transformer.ln_f.bias.add_(1e-2 * weight(self).norm())
        written(self)
        super().log(logs, *args, **kwargs)


class Evaluates:
    """Writes before an evaluation, and in the middle of one."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.evaluate`."""
        written(self)
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.prediction_step`."""
        written(self, 0.999)
        return super().prediction_step(*args, **kwargs)


class Step:
    """Writes before and after a micro-batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.training_step`."""
        written(self)
        loss = super().training_step(*args, **kwargs)
        written(self, 1.01)
        return loss


class Elsewhere:
    """Writes at other times."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.get_batch_samples`."""
        written(self)
        return super().get_batch_samples(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
        written(self)
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        written(self)
        return super()._save_checkpoint(*args, **kwargs)


def collating(trainer: Trainer) -> None:
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: by_weights(trainer, collate(rows))


def metrics(trainer: Trainer) -> None:
    def compute(prediction: Any) -> dict[str, float]:
        written(trainer)
        return {}

    trainer.compute_metrics = compute


def rates(trainer: Trainer) -> None:
    trainer.create_optimizer()
    rate = lambda step: 1 / (1 + weight(trainer).detach().norm().item())  # noqa: E731
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, rate)


CASES: dict[str, Script] = {
    "inputs": Script(mixin=Inputs, max_steps=4),
    "logs": Script(mixin=Log, max_steps=4, logging_strategy="steps", logging_steps=1),
    "evaluations": Script(mixin=Evaluates, max_steps=3, **EVALUATES),
    "steps": Script(mixin=Step, max_steps=4),
    "other times": Script(mixin=Elsewhere, max_steps=4, **SAVES),
    "collator": Script(collating, max_steps=4),
    "metrics": Script(metrics, max_steps=3, **EVALUATES),
    "learning rates": Script(rates, max_steps=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_at_rest(case: str, tmp_path: Path) -> None:
    assert_equal(tmp_path, CASES[case], exact=("1f1b",) if case in ("inputs", "steps", "learning rates") else ())


class LooksAtGradients:
    """Within an update."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.training_step`."""
        loss = super().training_step(*args, **kwargs)
        self.seen = weight(self).grad
        return loss


def test_gradients_within_an_update_are_refused(tmp_path: Path) -> None:
    why = "a gradient is asked for within an update"
    assert_refused(tmp_path, Script(mixin=LooksAtGradients), why, ("pipelined", "1f1b", "alone"))


class Anneals:
    """Dropout grows with the steps."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.training_step`."""
        for layer in self.model.transformer.h:
            layer.mlp.dropout.p = 0.1 * self.state.global_step
        return super().training_step(*args, **kwargs)


class AnnealsInTheLoss:
    """The same where other stages are at other micro-batches."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        self.model.transformer.h[0].mlp.dropout.p += 0.1
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.slow
def test_settings_changed_outside_of_callbacks(tmp_path: Path) -> None:
    def model() -> Any:
        return tiny_model(tied=False, dropout=0.1)

    script = Script(model=model, mixin=Anneals, max_steps=4)
    assert_equal(tmp_path, script, exact=())
    assert (
        differing(script.run(tmp_path, "reference"), Script(model=model, max_steps=4).run(tmp_path, "reference")) != []
    )
    assert_refused(tmp_path, Script(model=model, mixin=AnnealsInTheLoss), "dropout.p was changed", ("pipelined",))


class AnnealsBefore:
    """Dropout grows with the steps, before a callback has its turn."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.get_batch_samples`."""
        for layer in self.model.transformer.h:
            layer.mlp.dropout.p = 0.1 * self.state.global_step
        return super().get_batch_samples(*args, **kwargs)


class Looks(TrainerCallback):
    """Looks at a weight, and changes nothing."""

    def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """See `TrainerCallback.on_step_begin`."""
        self.seen = model.lm_head.weight.norm().item()


def test_settings_changed_before_a_callback_looks(tmp_path: Path) -> None:
    def model() -> Any:
        return tiny_model(tied=False, dropout=0.1)

    def looked_at(trainer: Trainer) -> None:
        trainer.add_callback(Looks())

    expected = Script(model=model, mixin=AnnealsBefore).run(tmp_path, "pipelined")
    assert differing(expected, Script(looked_at, model, AnnealsBefore).run(tmp_path, "pipelined")) == []
    trainer = Script(model=model, mixin=AnnealsInTheLoss, gradient_accumulation_steps=1).trainer(tmp_path, "pipelined")
    looked_at(trainer)
    with pytest.raises(UnsupportedOptionError, match="dropout.p was changed"):
        trainer.train()


class OfNow:
    """A loss of what changes with the steps, besides the model."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        momentum = sum(float(s["exp_avg"].abs().sum()) for s in self.optimizer.state.values() if "exp_avg" in s)
        logs = sum("loss" in entry for entry in self.state.log_history)
        return model(**inputs).loss * (1 + momentum + logs + self.lr_scheduler.get_last_lr()[0])


def test_a_loss_that_reads_optimizer_and_logs(tmp_path: Path) -> None:
    assert_equal(tmp_path, Script(mixin=OfNow, max_steps=4, logging_strategy="steps", logging_steps=1))


def test_context_variables_of_the_script_s_thread(tmp_path: Path) -> None:
    from contextvars import ContextVar

    factor: ContextVar[float] = ContextVar("factor", default=1.0)

    class Factor:
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return model(**inputs).loss * factor.get()

    token = factor.set(2.0)
    try:
        assert_equal(tmp_path, Script(mixin=Factor), delayed=())
    finally:
        factor.reset(token)
