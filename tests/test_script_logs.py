"""Logs: each of its own step and exactly once, equal to Trainer's where nothing is late, and to the reference's elsewhere."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import IterableDataset
from trainer_helpers import Rows, logged, ouroboros, split_options, stock, tiny_model
from transformers import Trainer, TrainerCallback

ALIKE = {
    "each step": {},
    "in between": {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "gradient_accumulation_steps": 1},
    "epochs": {"logging_strategy": "epoch", "num_train_epochs": 3},
    "the first": {"logging_first_step": True, "logging_steps": 4, "include_num_input_tokens_seen": "all"},
}


def history(trainer: Trainer, *without: str) -> list[dict[str, Any]]:
    """The log history but for times."""
    return [
        {k: v for k, v in entry.items() if k not in without and "runtime" not in k and "per_second" not in k}
        for entry in trainer.state.log_history
    ]


def without_dropout(**trainer: Any) -> dict[str, Any]:
    return {"model": tiny_model(dropout=0.0), **trainer}


class Late(TrainerCallback):
    """Pauses at random, as on a machine that others use."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(random.random() / 300)


@pytest.mark.slow
@pytest.mark.parametrize("options", ALIKE.values(), ids=ALIKE.keys())
def test_without_delay_the_history_is_that_of_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = stock(tmp_path, **options)
    expected.train()
    for stages, devices in ((1, 1), (3, 2)):
        clip = {"clip_scope": "global"} if stages == 1 else {"max_grad_norm": 0}
        if stages > 1:
            expected = stock(tmp_path, **options, max_grad_norm=0)
            expected.train()
        found = ouroboros(
            tmp_path, without_dropout(), schedule="1f1b", **clip, **split_options(stages, devices), **options
        )
        found.train()
        # Trainer's eval_loss is a mean over batches; the norm over stages may be rounded in another way.
        other = ("eval_loss", "grad_norm")[: 1 if stages == 1 else 2]
        assert history(found, *other) == history(expected, *other)
        assert logged(found, "grad_norm") == pytest.approx(logged(expected, "grad_norm"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", ALIKE.values(), ids=ALIKE.keys())
def test_with_delay_it_is_that_of_the_reference(tmp_path: Path, options: dict[str, Any]) -> None:
    runs = []
    for schedule in ("reference", "lockstep", "pipelined"):
        runs.append(ouroboros(tmp_path, schedule=schedule, **split_options(3, 2), **options))
        runs[-1].train()
    assert history(runs[1]) == history(runs[2]) == history(runs[0])
    steps = logged(runs[2], "step")
    assert steps == sorted(steps)


@pytest.mark.slow
def test_it_does_not_depend_on_timing(tmp_path: Path) -> None:
    first = None
    for i in range(10):
        trainer = ouroboros(
            tmp_path, {"callbacks": [Late()] if i % 2 else None}, num_train_epochs=2, **split_options(4, 3)
        )
        trainer.train()
        first = first or history(trainer)
        assert history(trainer) == first
    assert [entry["step"] for entry in first] == [*range(1, 7), 6]
    assert all("loss" in entry and "grad_norm" in entry for entry in first[:-1])


class Endless(IterableDataset):
    """Rows without a length: five micro-batches, so that epochs end within an update."""

    def __iter__(self) -> Any:
        return iter(Rows(18, masks=False))


@pytest.mark.slow
def test_an_epoch_may_end_within_an_update(tmp_path: Path) -> None:
    options = {"logging_strategy": "epoch", "max_steps": 6, "gradient_accumulation_steps": 2, "max_grad_norm": 0}
    data = {"train_dataset": Endless()}
    expected = stock(tmp_path, dict(data), **options)
    expected.train()
    found = ouroboros(tmp_path, without_dropout(**data), schedule="1f1b", **split_options(3, 2), **options)
    found.train()
    assert history(found, "grad_norm") == history(expected, "grad_norm")
    late = [
        ouroboros(tmp_path, dict(data), schedule=s, **split_options(3, 2), **options)
        for s in ("reference", "pipelined")
    ]
    for trainer in late:
        trainer.train()
    assert history(late[0]) == history(late[1])


class StopsByLoss(TrainerCallback):
    """Ends training as soon as a loss is below a bound."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        control.should_training_stop = logs.get("loss", 9.0) < 4.11


def test_a_callback_that_decides_by_losses_decides_at_their_step(tmp_path: Path) -> None:
    ends = []
    for schedule in ("reference", "pipelined"):
        trainer = ouroboros(tmp_path, {"callbacks": [StopsByLoss()]}, schedule=schedule, **split_options(3, 2))
        trainer.train()
        ends.append((trainer.state.global_step, history(trainer)))
    assert ends[0] == ends[1] and 1 < ends[0][0] < 6


def test_a_log_of_ones_own_changes_nothing(tmp_path: Path) -> None:
    class Own(type(ouroboros(tmp_path))):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, "step twice": self.state.global_step}, *args, **kwargs)

    trainer = ouroboros(tmp_path, {"cls": Own}, **split_options(3, 2))
    trainer.train()
    plain = ouroboros(tmp_path, **split_options(3, 2))
    plain.train()
    assert history(trainer, "step twice") == history(plain)
    assert [e["step twice"] for e in trainer.state.log_history] == [e["step"] for e in trainer.state.log_history]


@pytest.mark.slow
def test_resumed_twice_logs_alike(tmp_path: Path) -> None:
    ouroboros(tmp_path, save_strategy="steps", save_steps=3, **split_options(3, 2)).train()
    histories = []
    for schedule in ("reference", "pipelined", "pipelined"):
        trainer = ouroboros(tmp_path, schedule=schedule, **split_options(3, 2))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        histories.append(history(trainer, "train_loss", "total_flos"))
    assert histories[0] == histories[1] == histories[2]
    assert [entry["step"] for entry in histories[0]] == [1, 2, 3, 4, 5, 6, 6]
