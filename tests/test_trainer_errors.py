"""What goes wrong is named, leaves no threads behind, and does not spoil the trainer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import AtStep, Rows, assert_same, ouroboros, outcome, split_options, tiny_model, trained
from transformers import GPT2Config, GPT2Model, TrainerCallback

from hf_ouroboros import (
    DeviceMapError,
    OuroborosTrainer,
    UnsupportedModelError,
    UnsupportedOptionError,
    WorkerError,
)


def ouroboros_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ouroboros")]


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    yield
    assert ouroboros_threads() == []


class Boom(Exception):
    pass


class FailingLoss:
    """A loss that fails once, at its nth call."""

    def __init__(self, nth: int, error: BaseException):
        self.left = nth
        self.error = error

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise self.error
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return loss / num_items_in_batch


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep", "1f1b"])
@pytest.mark.parametrize("nth", [1, 4, 10])
def test_a_failing_loss(tmp_path: Path, schedule: str, nth: int) -> None:
    error = Boom("no loss today")
    trainer = ouroboros(tmp_path, {"compute_loss_func": FailingLoss(nth, error)}, schedule=schedule)
    with pytest.raises(WorkerError, match=rf"cpu:0.*Forward\(stage=2, tick={nth - 1}\).*Boom: no loss today") as caught:
        trainer.train()
    assert caught.value.__cause__ is error
    assert caught.value.device == "cpu:0"
    assert ouroboros_threads() == []
    assert trainer.is_in_train is False
    # The same trainer can be asked again.
    trainer.train()
    assert trainer.state.global_step == 6
    assert all(p.grad is None for p in trainer.model.parameters())


def test_after_a_failure_a_new_run_is_a_clean_one(tmp_path: Path) -> None:
    """The failure comes before the first update was applied anywhere."""

    def trainer(nth: int) -> OuroborosTrainer:
        return ouroboros(tmp_path, {"compute_loss_func": FailingLoss(nth, Boom())})

    failing, expected = trainer(1), trainer(-1)
    with pytest.raises(WorkerError):
        failing.train()
    failing.train()
    expected.train()
    assert_same(expected, failing)


def test_a_failure_in_the_middle_stage(tmp_path: Path) -> None:
    trainer = ouroboros(tmp_path, **split_options(3, 2))
    block = trainer.stage_plan.rows[1].modules[0]

    def fail(module: Any, arguments: Any) -> None:
        if module.training and trainer.engine is not None:  # not while the stages are made, which is again now
            raise Boom("block")

    trainer.model.get_submodule(block).register_forward_pre_hook(fail)
    with pytest.raises(WorkerError, match=r"cpu:1.*Forward\(stage=1, tick=0\).*Boom: block"):
        trainer.train()


def test_the_reference_raises_the_error_itself(tmp_path: Path) -> None:
    trainer = ouroboros(tmp_path, {"compute_loss_func": FailingLoss(3, Boom("plain"))}, schedule="reference")
    with pytest.raises(Boom, match="plain"):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, Boom])
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
def test_an_error_in_a_callback(tmp_path: Path, schedule: str, error: type[BaseException]) -> None:
    trainer = ouroboros(tmp_path, schedule=schedule)

    def fail() -> None:
        raise error

    callback = AtStep(3, fail)
    trainer.add_callback(callback)
    with pytest.raises(error):
        trainer.train()
    assert ouroboros_threads() == []
    assert trainer.is_in_train is False
    assert torch.isfinite(trainer.model(input_ids=Rows(2).ids).logits).all()
    trainer.evaluate()
    trainer.remove_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("event", ["on_train_begin", "on_substep_end", "on_evaluate", "on_save", "on_train_end"])
def test_an_error_in_any_event(tmp_path: Path, event: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise Boom(event)

    callback = type("Failing", (TrainerCallback,), {event: fail})()
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(Boom, match=event):
        trained(tmp_path, {"callbacks": [callback]}, **options)
    assert ouroboros_threads() == []


def test_a_failing_dataset(tmp_path: Path) -> None:
    class Broken(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if index == 7:
                raise Boom("row 7")
            return super().__getitem__(index)

    with pytest.raises(Boom, match="row 7"):
        trained(tmp_path, {"train_dataset": Broken(18)})


def test_a_token_outside_of_the_vocabulary(tmp_path: Path) -> None:
    class Wrong(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = super().__getitem__(index)
            return row | {"input_ids": row["input_ids"] + 1000}

    with pytest.raises(WorkerError, match=r"Forward\(stage=0, tick=0\).*IndexError"):
        trained(tmp_path, {"train_dataset": Wrong(18)})


def test_no_threads_before_training(tmp_path: Path) -> None:
    trainer = ouroboros(tmp_path)
    trainer.evaluate()
    assert ouroboros_threads() == []
    assert trainer.engine is None


def test_threads_are_named_while_training(tmp_path: Path) -> None:
    trainer, names = ouroboros(tmp_path), []
    trainer.add_callback(AtStep(2, lambda: names.extend(ouroboros_threads())))
    trainer.train()
    assert names == ["ouroboros cpu:0", "ouroboros cpu:1"]


# ---- refusals before any work ----


def test_models_that_are_not_supported(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    for model in (GPT2Model(config), torch.nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModelError):
            ouroboros(tmp_path, {"model": model})


def test_device_maps_that_do_not_fit(tmp_path: Path) -> None:
    for device_map in ([1, 2], {"nowhere": 0}, "zigzag", '{"transformer": '):
        with pytest.raises((DeviceMapError, UnsupportedOptionError), match="device_map"):
            ouroboros(tmp_path, device_map=device_map)
    with pytest.raises(DeviceMapError, match="num_stages=9"):
        ouroboros(tmp_path, num_stages=9)
    with pytest.raises((DeviceMapError, UnsupportedOptionError), match="max_memory"):
        ouroboros(tmp_path, max_memory='{"0": 10}')


def test_optimizers_that_are_not_supported(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(UnsupportedOptionError, match="LBFGS"):
        ouroboros(tmp_path, {"model": model, "optimizers": (torch.optim.LBFGS(model.parameters()), None)})
    foreign = torch.optim.SGD(tiny_model().parameters(), lr=0.1)
    with pytest.raises(UnsupportedOptionError, match="SGD holds parameters that are not the model's"):
        ouroboros(tmp_path, {"model": model, "optimizers": (foreign, None)})


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        ouroboros(tmp_path, {"model": None})


def test_weights_are_untouched_by_setting_up(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in tiny_model().state_dict().items()}
    trainer = ouroboros(tmp_path)
    assert_same(before, dict(trainer.model.state_dict()))
    trainer.evaluate()
    assert_same(before, dict(trainer.model.state_dict()))
    trainer.train()
    assert outcome(trainer)["step"] == 6


SCHEDULES = ["pipelined", "lockstep", "1f1b", "reference"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_to_train(tmp_path: Path, schedule: str) -> None:
    frozen = tiny_model().requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="no parameter of this GPT2LMHeadModel requires a gradient"):
        trained(tmp_path, {"model": frozen}, schedule=schedule)
    model = tiny_model()
    model.transformer.ln_f.requires_grad_(False)
    optimizers = torch.optim.SGD(model.transformer.ln_f.parameters(), lr=0.1), None
    with pytest.raises(UnsupportedOptionError, match="optimizer SGD holds no parameter that requires a gradient"):
        trained(tmp_path, {"model": model, "optimizers": optimizers}, schedule=schedule)


def detached(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs.logits.float().mean().detach()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_loss_without_a_gradient(tmp_path: Path, schedule: str) -> None:
    trainer = ouroboros(tmp_path, {"compute_loss_func": detached}, schedule=schedule)
    before = outcome_of_weights(trainer)
    with pytest.raises(
        (WorkerError, UnsupportedOptionError), match="UnsupportedOptionError|the loss does not depend on"
    ):
        trainer.train()
    assert trainer.state.global_step < 2 and "loss" not in str(trainer.state.log_history)
    assert_same(before, outcome_of_weights(trainer))


def outcome_of_weights(trainer: OuroborosTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("kept", ["wte", "h.2.", "ln_f"])
def test_a_model_that_is_mostly_frozen(tmp_path: Path, kept: str) -> None:
    """Trains what is left, wherever it is."""
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kept in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trained(tmp_path, {"model": model}, **split_options(3, 2))
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(kept in name for name in changed)
