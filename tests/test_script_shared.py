"""What a script's code keeps in one stage for its code in another: of the same micro-batch, or refused by name."""

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

from hf_ouroboros.hooks.shared_state import shares_state


def hidden(output: Any) -> torch.Tensor:
    return (output[0] if isinstance(output, tuple) else output).detach()


def in_a_list(trainer: Trainer) -> None:
    kept = trainer.kept = [torch.zeros(())]

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        kept[0] = hidden(output).mean()

    trainer.model.transformer.h[0].register_forward_hook(hook)


def in_the_trainer(trainer: Trainer) -> None:
    trainer.kept = [0.0]

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        trainer.kept = [hidden(output).mean().item()]

    trainer.model.transformer.h[2].register_forward_hook(hook)


class Kept:
    """A loss of what a hook has kept."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        return model(**inputs).loss * (1 + self.kept[0])


def in_a_variable(trainer: Trainer) -> None:
    last = 0.0

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal last
        last = hidden(output).mean().item()

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) * (1 + last)

    trainer.model.transformer.h[1].register_forward_hook(hook)
    trainer.compute_loss_func = loss


def from_hook_to_hook(trainer: Trainer) -> None:
    kept: dict[str, float] = {}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.update(mean=hidden(output).mean().item())

    trainer.model.transformer.h[0].register_forward_hook(keep)
    trainer.model.transformer.h[4].mlp.register_forward_hook(lambda m, i, o: o * (1 + kept["mean"]))


CASES: dict[str, Script] = {
    "a list": Script(in_a_list, mixin=Kept, max_steps=4),
    "the trainer": Script(in_the_trainer, mixin=Kept, max_steps=4),
    "a variable": Script(in_a_variable, max_steps=4),
    "two hooks": Script(from_hook_to_hook, max_steps=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_of_the_same_micro_batch(case: str, tmp_path: Path) -> None:
    assert_equal(tmp_path, CASES[case])


def test_a_replay_would_overwrite_it(tmp_path: Path) -> None:
    assert_refused(
        tmp_path, Script(in_a_list, mixin=Kept, recompute=True), "which a replay overwrites", ("pipelined", "1f1b")
    )


def test_an_attribute_of_a_module(tmp_path: Path) -> None:
    def prepare(trainer: Trainer) -> None:
        layer = trainer.model.transformer.h[1].mlp
        layer.register_forward_hook(lambda module, inputs, output: setattr(module, "mean", output.mean().item()))
        layer.mean, trainer.kept = 0.0, [0.0]

    assert_refused(tmp_path, Script(prepare, mixin=Kept), "leaves mean behind as an attribute", ("pipelined", "1f1b"))


def alike(trainer: Trainer) -> None:
    for layer in trainer.model.transformer.h:
        layer.mlp.register_forward_hook(lambda module, inputs, output: output * 0.9)


def counting(trainer: Trainer) -> None:
    for layer in trainer.model.transformer.h:
        calls: list[int] = []
        layer.mlp.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(1))


def reading_only(trainer: Trainer) -> None:
    for layer in trainer.model.transformer.h:
        layer.mlp.register_forward_hook(lambda module, inputs, output: output * (1 + 0 * trainer.state.global_step))


@pytest.mark.parametrize("prepare", [alike, counting, reading_only])
def test_hooks_that_share_nothing_cost_nothing(prepare: Callable[[Trainer], None], tmp_path: Path) -> None:
    trainer = Script().trainer(tmp_path, "pipelined")
    prepare(trainer)
    trainer._partition.carry_hooks()
    assert not shares_state(trainer._partition.stages, trainer)
