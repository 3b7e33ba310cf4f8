"""Values that a script's code takes from weights while stages compute: stock Trainer's, the reference's, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from script_runs import Script, assert_equal, assert_refused
from torch import nn
from trainer_helpers import tiny_model
from transformers import Trainer

from hf_ouroboros.errors import OuroborosError, WorkerError

Factor = Callable[[Trainer], Any]


def first(trainer: Trainer) -> nn.Parameter:
    return trainer.model.transformer.h[0].mlp.c_fc.weight


def head(trainer: Trainer) -> nn.Parameter:
    return trainer.model.lm_head.weight


def scaled_by(factor: Factor, prepare: Callable[[Trainer], Any] = lambda trainer: None, **options: Any) -> Script:
    """A loss times something."""

    class Scaled:
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return model(**inputs).loss * factor(self)

    return Script(prepare, mixin=Scaled, **options)


def without_gradient(trainer: Trainer) -> torch.Tensor:
    with torch.no_grad():
        return 1 + first(trainer).square().sum()


def swallowing(trainer: Trainer) -> float:
    """Nobody hears of an error that is raised where it reads."""
    try:
        return 1 + head(trainer).norm().item() * 0 + first(trainer).norm().item()
    except OuroborosError:
        return 1.0


def keep(trainer: Trainer) -> None:
    trainer.kept = first(trainer).data


WAYS: dict[str, Script] = {
    "item": scaled_by(lambda t: 1 + first(t).norm().item()),
    "without a gradient": scaled_by(without_gradient),
    "NumPy": scaled_by(lambda t: 1 + float(abs(first(t).detach().numpy()).mean())),
    "a list": scaled_by(lambda t: 1 + first(t).tolist()[0][0]),
    "a copy of the model": scaled_by(lambda t: 1 + next(copy.deepcopy(t.model).parameters()).mean().detach()),
    "an error that is swallowed": scaled_by(swallowing),
    "a view kept from before": scaled_by(lambda t: 1 + t.kept.norm(), keep),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_reads_another_stage_s_weights(way: str, tmp_path: Path) -> None:
    """Where all stages are at the same version, it finds that."""
    assert_refused(tmp_path, WAYS[way], "the loss reads the parameter transformer.", ("pipelined",))
    if way in ("item", "a view kept from before"):
        assert_refused(tmp_path, WAYS[way], "the loss reads the parameter transformer.", ("reference", "lockstep"))
        assert_equal(tmp_path, WAYS[way], exact=("1f1b",), delayed=())


def test_what_a_loss_may_read(tmp_path: Path) -> None:
    """Shapes of anything, what is frozen, and the last stage's own weights."""

    def prepare(trainer: Trainer) -> None:
        trainer.model.transformer.h[2].mlp.c_fc.weight.requires_grad_(False)

    def factor(trainer: Trainer) -> Any:
        frozen = trainer.model.transformer.h[2].mlp.c_fc.weight
        return (
            1
            + first(trainer).new_zeros(first(trainer).shape[0]).sum()
            + frozen.norm().item()
            + head(trainer).norm().item()
        )

    assert_equal(tmp_path, scaled_by(factor, prepare))


NOT_OWN = {
    "a matrix that the first stage steps": {"model": lambda: tiny_model(dropout=0.0)},
    "real weights where predicted ones are used": {"delay_compensation": "weight_prediction"},
}


@pytest.mark.parametrize("case", NOT_OWN)
def test_own_weights_that_are_not_those_of_the_forward(case: str, tmp_path: Path) -> None:
    assert_refused(
        tmp_path, scaled_by(lambda t: 1 + head(t).norm().item(), **NOT_OWN[case]), "the loss reads", ("pipelined",)
    )


def late(script: Script, folder: Path, why: str) -> None:
    """Not before the first update, but at once, and by name."""
    torch.set_num_threads(1)
    trainer = script.trainer(folder, "pipelined")
    script.prepare(trainer)
    with pytest.raises(WorkerError, match=why):
        trainer.train()


def test_a_loss_that_begins_to_read_later(tmp_path: Path) -> None:
    script = scaled_by(lambda t: 1 + (first(t).detach().norm() if t.state.global_step >= 3 else 0), max_steps=5)
    late(script, tmp_path, "the loss reads the parameter transformer.h.0.mlp.c_fc.weight")


def reading(layer: int, read: Callable[[Trainer], nn.Parameter], after: int = 0) -> Callable[[Trainer], None]:
    """A forward hook that multiplies by a norm, after so many calls."""

    def prepare(trainer: Trainer) -> None:
        calls: list[int] = []

        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return output * (1 + read(trainer).norm().item()) if len(calls) > after else output

        trainer.model.transformer.h[layer].mlp.register_forward_hook(hook)

    return prepare


@pytest.mark.slow
def test_a_hook_that_reads_weights(tmp_path: Path) -> None:
    """Those of its own stage are right, unless the forward is replayed when they are others.

    With `1f1b`, those of stages before are right, too; a stage behind may not have stepped yet.
    """
    kinds = ("pipelined", "1f1b")
    assert_refused(
        tmp_path, Script(reading(1, head)), "the forward of stage 1 reads the parameter lm_head.weight", kinds
    )
    assert_refused(tmp_path, Script(reading(1, first)), ", use schedule='1f1b'", ("pipelined",))
    assert_equal(tmp_path, Script(reading(1, first)), delayed=())
    own = reading(2, lambda t: t.model.transformer.h[2].mlp.c_fc.weight)
    assert_equal(tmp_path, Script(own), exact=())
    assert_refused(tmp_path, Script(own, recompute=True), "the forward of stage 1 reads", ("pipelined",))
    late(Script(reading(1, head, after=3)), tmp_path, "the forward of stage 1 reads the parameter lm_head.weight")


def on_gradient(trainer: Trainer) -> None:
    first(trainer).register_hook(lambda gradient: gradient * head(trainer).norm())


def in_a_backward(trainer: Trainer) -> None:
    layer = trainer.model.transformer.h[1].mlp
    layer.register_full_backward_hook(lambda module, before, after: (before[0] * head(trainer).detach().norm(),))


def on_a_hidden_state(trainer: Trainer) -> None:
    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * head(trainer).detach().norm())

    trainer.model.transformer.h[1].mlp.register_forward_hook(hook)


@pytest.mark.parametrize("prepare", [on_gradient, in_a_backward, on_a_hidden_state])
def test_a_gradient_hook_that_reads_another_stage_s_weights(prepare: Callable, tmp_path: Path) -> None:
    """When it is called: stages before have stepped by then."""
    late(Script(prepare), tmp_path, "reads the parameter lm_head.weight, which may be that of another micro-batch")


class OwnBackward:
    """Takes gradients of a part of the loss by itself."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        outputs = model(**inputs)
        outputs.logits.square().mean().backward(retain_graph=True)
        return outputs.loss


class Adversary:
    """Trains a part of its own within the loss."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        outputs = model(**inputs)
        self.scale = getattr(self, "scale", nn.Parameter(torch.ones(())))
        (outputs.logits.detach() * self.scale).square().mean().backward()
        with torch.no_grad():
            self.scale -= 0.1 * self.scale.grad
        self.scale.grad = None
        return outputs.loss * self.scale.item()


class GradientOfTheHead:
    """Weighs a loss by its gradient with respect to the last layer."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        loss = model(**inputs).loss
        found = torch.autograd.grad(loss, self.model.lm_head.weight, retain_graph=True, allow_unused=True)[0]
        return loss * (1 + (0 if found is None else found.norm()))


@pytest.mark.slow
def test_gradients_in_a_loss(tmp_path: Path) -> None:
    everywhere = ("pipelined", "1f1b", "reference", "alone")
    seen = scaled_by(lambda t: 1.0 if head(t).grad is None else 2.0)
    assert_refused(tmp_path, seen, "the loss asks for the gradient of lm_head.weight", everywhere)
    assert_refused(tmp_path, Script(mixin=OwnBackward), "the loss calls backward() by itself", everywhere)
    assert_refused(
        tmp_path, Script(mixin=GradientOfTheHead), "the loss asks for the gradient of lm_head.weight", ("pipelined",)
    )
    assert_equal(tmp_path, Script(mixin=GradientOfTheHead), exact=("alone",), delayed=())
    assert_equal(tmp_path, Script(mixin=Adversary))


class Writes:
    """Weights are written in the loss."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        with torch.no_grad():
            self.model.transformer.h[0].mlp.c_fc.weight.mul_(0.99)
        return model(**inputs).loss


def test_a_loss_that_writes_weights(tmp_path: Path) -> None:
    assert_refused(tmp_path, Script(mixin=Writes), "the loss writes the parameter", ("pipelined", "1f1b"))
    assert_equal(tmp_path, Script(mixin=Writes), exact=("alone",), delayed=())
