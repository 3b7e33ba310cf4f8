"""What a script does over two processes: the numbers and logs of one process, or a named error in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rig import Ended, ends_of
from test_process_trainer import assert_equal
from trainer_helpers import split_options
from trainer_runs import Stream, run_all, run_here, train_part
from transformers import TrainerCallback

from hf_ouroboros import OuroborosTrainer


class Clamps(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.02, 0.02)


class Freezes(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for p in model.transformer.h[1].parameters():
            p.requires_grad_(state.global_step % 2 == 0)


class OnlyTheMainProcess(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.norms = [p.norm() for p in model.parameters()]


def constant(step: int) -> float:
    return 1.0


class AddsGroup(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            extra = torch.nn.Parameter(torch.zeros(1))
            optimizer.add_param_group({"params": [extra], "lr": 1e-2, "initial_lr": 1e-2})
            kwargs["lr_scheduler"].base_lrs.append(1e-2)
            kwargs["lr_scheduler"].lr_lambdas.append(constant)


class LosesSight(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


class StepOfOnesOwn(OuroborosTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().training_step(*args, **kwargs) * 2


def run(name: str, schedule: str, trainer: dict[str, Any], options: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "trainer": trainer,
        "model": {"layers": 3},
        "options": {"num_stages": 3, "schedule": schedule, "max_steps": 5, **(options or {})},
    }


@pytest.mark.slow
def test_the_numbers_and_logs_of_one_process(tmp_path: Path) -> None:
    ragged = {"logging_strategy": "epoch", "num_train_epochs": 3, "clip_scope": "global"}
    runs = [
        run("written", "pipelined", {"callbacks": [Clamps(), Freezes(), OnlyTheMainProcess()]}),
        run("added", "pipelined", {"callbacks": [AddsGroup()]}),
        run("own step", "pipelined", {"cls": StepOfOnesOwn}, {"logging_steps": 2}),
        run("ragged", "1f1b", {"train_dataset": Stream(18)}, ragged),
    ]
    found = run_all(tmp_path, 2, runs)
    for given, result in zip(runs, found, strict=True):
        schedule = {"pipelined": "reference"}.get(given["options"]["schedule"], "1f1b")
        here = {**given["options"], "schedule": schedule, **split_options(3, 2)}
        expected = run_here(tmp_path, {**given, "name": f"{given['name']} here", "options": here})
        assert_equal(expected, result, "weights", "step", "scheduler")
        assert result["log"] == expected["log"], given["name"]


@pytest.mark.slow
def test_gradients_that_are_elsewhere(tmp_path: Path) -> None:
    given = run("refused", "pipelined", {"callbacks": [LosesSight()]})
    for end in ends_of(2, train_part, str(tmp_path), [given]):
        assert isinstance(end, Ended) and end.how == "raised"
        assert "LosesSight.on_pre_optimizer_step looks at gradients" in end.text
