"""Losses that reach past the model's outputs: right with a single stage, refused by name with several, however they got there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from script_runs import Script, assert_equal, assert_refused
from torch import nn
from transformers import Trainer

from hf_ouroboros.errors import WorkerError


def squares(parameters: Any) -> torch.Tensor:
    return 0.1 * sum(parameter.square().sum() for parameter in parameters)


def adding(penalty: Callable[[Any, Any], torch.Tensor]) -> type:
    """A trainer class that adds to the model's loss what is made of (trainer, model)."""

    class Penalised:
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(**inputs)
            loss = outputs.loss + penalty(self, model)
            return (loss, outputs) if return_outputs else loss

    return Penalised


def norms(modules: Any) -> torch.Tensor:
    return squares(module.weight for module in modules if isinstance(module, nn.LayerNorm))


WAYS: dict[str, tuple[Callable[[Any, Any], torch.Tensor], str]] = {
    "parameters of the model given": (lambda t, m: squares(m.parameters()), "asks for the model's parameters"),
    "modules of the model given": (lambda t, m: norms(m.modules()), "asks for the model's modules"),
    "a method of the model given": (
        lambda t, m: squares(m.get_input_embeddings().parameters()),
        "get_input_embeddings",
    ),
    "parameters of self.model": (lambda t, m: squares(t.model.parameters()), "past the model's outputs"),
    "only the last stage's own": (lambda t, m: squares([t.model.lm_head.weight]), "the parameter lm_head.weight past"),
    "only the first stage's": (lambda t, m: squares([t.model.transformer.wpe.weight]), "transformer.wpe.weight past"),
    "a call of self.model": (
        lambda t, m: 0.1 * t.model(input_ids=torch.arange(6)[None]).logits.square().mean(),
        "the loss calls the trainer's GPT2LMHeadModel itself",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_a_parameter(way: str, tmp_path: Path) -> None:
    penalty, why = WAYS[way]
    assert_equal(tmp_path, Script(mixin=adding(penalty)), exact=("alone",), delayed=())
    assert_refused(tmp_path, Script(mixin=adding(penalty)), why, ("pipelined", "reference"))


def with_closure(penalty: Callable[[Trainer], torch.Tensor]) -> Callable[[Trainer], None]:
    def prepare(trainer: Trainer) -> None:
        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch + penalty(trainer)

        trainer.compute_loss_func = loss

    return prepare


def test_a_closure(tmp_path: Path) -> None:
    prepare = with_closure(lambda trainer: squares(trainer.model.parameters()))
    assert_equal(tmp_path, Script(prepare), exact=("alone",), delayed=())
    assert_refused(tmp_path, Script(prepare), "past the model's outputs")


def test_a_penalty_that_begins_later(tmp_path: Path) -> None:
    """Not before the first update, but at once, and by name."""
    seen: list[int] = []

    def late(trainer: Trainer) -> torch.Tensor:
        seen.append(1)
        return squares([trainer.model.lm_head.weight]) if len(seen) > 3 else torch.zeros(())

    script = Script(max_steps=6)
    trainer = script.trainer(tmp_path, "pipelined")
    with_closure(late)(trainer)
    with pytest.raises(WorkerError, match="the loss reaches the parameter lm_head.weight past the model's outputs"):
        trainer.train()


def holding(layer: int) -> Callable[[Trainer], None]:
    """A loss of what a layer has put out, kept by a hook."""

    def prepare(trainer: Trainer) -> None:
        kept: list[torch.Tensor] = [torch.zeros(())]

        def keep(module: Any, inputs: Any, output: Any) -> None:
            kept[0] = output[0] if isinstance(output, tuple) else output

        trainer.model.transformer.h[layer].register_forward_hook(keep)
        with_closure(lambda t: 0.01 * kept[0].square().mean())(trainer)

    return prepare


def test_hidden_states_of_the_last_stage(tmp_path: Path) -> None:
    assert_equal(tmp_path, Script(holding(4)), delayed=("pipelined",))


def test_hidden_states_of_another_stage(tmp_path: Path) -> None:
    assert_refused(
        tmp_path, Script(holding(0)), "that is to be trained past the model's outputs", ("1f1b", "reference")
    )


def test_a_hook_with_a_parameter_of_another_stage(tmp_path: Path) -> None:
    def prepare(trainer: Trainer) -> None:
        head = trainer.model.lm_head
        trainer.model.transformer.h[1].mlp.register_forward_hook(lambda m, i, o: o + head.weight.mean())

    assert_equal(tmp_path, Script(prepare), exact=("alone",), delayed=())
    assert_refused(tmp_path, Script(prepare), "reaches the parameter lm_head.weight by a way of its own")


class LossFunction:
    """The model's own loss function, called by hand."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        logits = model(**inputs).logits
        return model.loss_function(logits, inputs["labels"], vocab_size=model.config.vocab_size)


class AsTuple:
    """The loss as the first of a tuple."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        return model(**inputs, return_dict=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("mixin", [LossFunction, AsTuple])
def test_what_a_loss_may_ask_of_the_model(mixin: type, tmp_path: Path) -> None:
    assert_equal(tmp_path, Script(mixin=mixin), exact=("1f1b",), delayed=("pipelined",))


class OwnStep:
    """Takes gradients of its own."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """See `Trainer.training_step`."""
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_training_step_of_its_own_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, Script(mixin=OwnStep), "a training step of its own", ("alone", "pipelined", "reference"))
