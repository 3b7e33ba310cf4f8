"""Checkpoints of a run: a resumed run equals the uninterrupted one, under every schedule."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from trainer_helpers import (
    TRANSFORMERS,
    AtStep,
    assert_same,
    copied,
    logged,
    ouroboros,
    outcome,
    split_options,
    tiny_model,
    trained,
)
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_ouroboros import CheckpointError, OuroborosTrainer


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("checkpoint-"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A pipelined run with a checkpoint after each of its 6 updates; 3 and 6 are ends of epochs."""
    folder = tmp_path_factory.mktemp("written")
    trainer = trained(folder, save_strategy="steps", save_steps=1)
    assert checkpoints(folder) == [f"checkpoint-{step}" for step in range(1, 7)]
    return folder, outcome(trainer)


def test_saving_changes_nothing(tmp_path: Path, written: tuple[Path, dict[str, Any]]) -> None:
    assert_same(trained(tmp_path), written[1])


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 6))
def test_resumes_from_every_checkpoint(tmp_path: Path, written: tuple[Path, dict[str, Any]], step: int) -> None:
    resumed = trained(tmp_path, resume=written[0] / f"checkpoint-{step}")
    assert_same(written[1], resumed)
    assert resumed.state.log_history[0]["step"] == 1, "the history goes on"


@pytest.mark.slow
@pytest.mark.parametrize(("step", "schedule"), [(1, "lockstep"), (3, "reference"), (4, "reference"), (4, "lockstep")])
def test_resumes_under_another_schedule(
    tmp_path: Path, written: tuple[Path, dict[str, Any]], step: int, schedule: str
) -> None:
    assert_same(written[1], trained(tmp_path, resume=written[0] / f"checkpoint-{step}", schedule=schedule))


@pytest.mark.slow
def test_goes_through_all_schedules(tmp_path: Path, written: tuple[Path, dict[str, Any]]) -> None:
    """reference, lockstep and pipelined with recompute, two updates each, in one folder."""
    options = {"save_strategy": "steps", "save_steps": 2}
    for stop, more in [
        (2, {"schedule": "reference"}),
        (4, {"schedule": "lockstep"}),
        (None, {"schedule": "pipelined", "recompute": True, "devices": ["cpu:0", "cpu:1", "cpu:2"], "num_stages": 3}),
    ]:
        trainer = ouroboros(tmp_path, **options, **more)
        if stop:
            trainer.add_callback(Stop(stop))
        trainer.train(resume_from_checkpoint=True if stop != 2 else None)
    assert_same(written[1], trainer)


class Stop(TrainerCallback):
    """Stops training after a step, and saves there."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


CASES: dict[str, dict[str, Any]] = {
    "one stage": split_options(1, 1),
    "five stages": split_options(5, 4),
    "untied": split_options(3, 3),
    "one micro-batch": {"gradient_accumulation_steps": 1},
    "before the delays": {"delay_warmup_steps": 4},
    "after the delays": {"delay_warmup_steps": 2},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "paper": {"schedule": "lockstep", "tied_gradient": "paper"},
    "1f1b": {"schedule": "1f1b"},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resumes_with_options(tmp_path: Path, case: str) -> None:
    def model() -> dict[str, Any]:
        return {"model": tiny_model(tied=case != "untied")}

    options = CASES[case] | {"save_strategy": "steps", "save_steps": 3}
    expected = outcome(trained(tmp_path, model(), **options))
    folder = tmp_path / "checkpoint-3"
    assert_same(expected, trained(tmp_path / "again", model(), resume=folder, **options))
    if case in ("five stages", "untied", "after the delays", "plateau"):
        options["schedule"] = "reference"
        assert_same(expected, trained(tmp_path / "reference", model(), resume=folder, **options))


@pytest.mark.slow
def test_continues_delayed_from_a_synchronous_checkpoint(tmp_path: Path) -> None:
    """1f1b leaves no gradients behind: it is a delay warm-up in another word."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.0}
    trained(tmp_path, schedule="1f1b", **options)
    folder = tmp_path / "checkpoint-2"
    found = [trained(tmp_path / name, resume=folder, schedule=name, **options) for name in ("reference", "pipelined")]
    assert_same(*found)


def test_resume_true_takes_the_last(tmp_path: Path, written: tuple[Path, dict[str, Any]]) -> None:
    trainer = ouroboros(tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(Stop(5))
    trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert_same(written[1], trained(tmp_path, resume=True))


def test_resume_true_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint"):
        trained(tmp_path, resume=True)


def test_a_checkpoint_is_a_plain_model(written: tuple[Path, dict[str, Any]]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(written[0] / "checkpoint-6").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in written[1]["weights"].items())


def test_the_files_of_a_checkpoint(tmp_path: Path, written: tuple[Path, dict[str, Any]]) -> None:
    """What the stock Trainer writes, and two files more."""
    folder = written[0] / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    expected = {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    expected |= {"trainer_state.json", "training_args.bin", "ouroboros_state.json", "ouroboros_state.safetensors"}
    assert expected <= names
    assert names - expected <= {"generation_config.json"}
    assert not [path for path in written[0].iterdir() if path.name.startswith(".")]
    state = json.loads((folder / "ouroboros_state.json").read_text())
    # 4 updates of 2, 2, 1 and 2 micro-batches; the default is 3 stages on two devices.
    assert (state["tick"], state["update"], state["num_stages"]) == (7, 4, 3)
    assert state["pending_ticks"] == {"0": [5, 6], "1": [6], "2": []}
    args = torch.load(folder / "training_args.bin", weights_only=False)
    assert args.schedule == "pipelined"


def test_optimizer_file_is_the_stock_one(tmp_path: Path, written: tuple[Path, dict[str, Any]]) -> None:
    """Any optimizer of the complete model can load it."""
    saved = torch.load(written[0] / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert saved["state"].keys() == set(range(len(list(tiny_model().parameters()))))
    assert len(saved["param_groups"]) == 2


def test_optimizer_state_after_training(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    assert_same(written[1]["optimizer"], copied(trainer.optimizer.state_dict()))


def test_save_only_model(tmp_path: Path) -> None:
    trainer = trained(tmp_path, save_strategy="steps", save_steps=3, save_only_model=True)
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {"model.safetensors", "config.json", "trainer_state.json"} <= names
    assert not names & {"ouroboros_state.json", "ouroboros_state.safetensors", "optimizer.pt"}
    before = outcome(trainer)["weights"]
    with pytest.raises(CheckpointError, match="ouroboros_state.json.*save_only_model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(before, outcome(trainer)["weights"])


def test_save_model_at_the_end(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.save_model(str(tmp_path / "final"))
    trainer.save_state()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert_same(outcome(trainer)["weights"], dict(loaded.state_dict()))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert (tmp_path / "trainer_state.json").is_file()


# ---- which checkpoints stay ----


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2])
def test_save_total_limit(tmp_path: Path, limit: int, written: tuple[Path, dict[str, Any]]) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": limit}
    trainer = ouroboros(tmp_path, **options)
    seen: list[list[str]] = []
    trainer.add_callback(OnSave(lambda: seen.append(checkpoints(tmp_path))))
    trainer.train()
    assert seen == [[f"checkpoint-{i}" for i in range(max(1, s + 1 - limit), s + 1)] for s in range(1, 7)]
    assert_same(written[1], trainer)
    assert_same(written[1], trained(tmp_path, resume=True, **options))


class OnSave(TrainerCallback):
    """Does something after every save."""

    def __init__(self, action: Any):
        self.action = action

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.action()


class Scores:
    """An evaluation metric that is best in the middle."""

    def __init__(self, values: list[float]):
        self.values = iter(values)

    def __call__(self, prediction: Any) -> dict[str, float]:
        return {"score": next(self.values)}


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 1])
def test_load_best_model_at_end(tmp_path: Path, limit: int | None, written: tuple[Path, dict[str, Any]]) -> None:
    given = {"compute_metrics": Scores([0.1, 0.2, 0.5, 0.3, 0.2, 0.1])}
    trainer = trained(tmp_path, given, save_total_limit=limit, **BEST)
    best = tmp_path / "checkpoint-3"
    assert trainer.state.best_model_checkpoint == str(best)
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 3)
    for kept in checkpoints(tmp_path):
        state = json.loads((tmp_path / kept / "trainer_state.json").read_text())
        step = int(kept.split("-")[1])
        assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{min(step, 3)}")
    assert "checkpoint-3" in checkpoints(tmp_path)
    assert len(checkpoints(tmp_path)) == (6 if limit is None else 1)
    loaded = AutoModelForCausalLM.from_pretrained(best)
    assert_same(dict(loaded.state_dict()), outcome(trainer)["weights"])
    third = AutoModelForCausalLM.from_pretrained(written[0] / "checkpoint-3")
    assert_same(dict(third.state_dict()), outcome(trainer)["weights"])


@pytest.mark.slow
def test_resumes_from_the_best_checkpoint(tmp_path: Path, written: tuple[Path, dict[str, Any]]) -> None:
    trained(tmp_path, {"compute_metrics": Scores([0.1, 0.2, 0.5, 0.3, 0.2, 0.1])}, save_total_limit=1, **BEST)
    options = {"save_strategy": "no"}
    assert_same(written[1], trained(tmp_path, resume=tmp_path / "checkpoint-3", **options))


def test_best_step_without_a_checkpoint(tmp_path: Path) -> None:
    """Evaluated after every update, saved after every second one: only a saved step can be the best checkpoint."""
    given = {"compute_metrics": Scores([0.1, 0.2, 0.5, 0.3, 0.2, 0.1])}
    options = BEST | {"save_steps": 2}
    found = trained(tmp_path, given, **(options | {"load_best_model_at_end": False}))
    assert found.state.best_global_step == 3
    assert found.state.best_model_checkpoint in (None, str(tmp_path / "checkpoint-2"))


def test_save_strategy_best(tmp_path: Path) -> None:
    given = {"compute_metrics": Scores([0.1, 0.3, 0.2, 0.4, 0.2, 0.1])}
    options = BEST | {"save_strategy": "best"}
    if TRANSFORMERS < Version("5.14"):
        pytest.skip("this transformers does not name the best checkpoint under save_strategy='best'")
    trainer = trained(tmp_path, given, **options)
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert_same(dict(loaded.state_dict()), outcome(trainer)["weights"])


def test_save_strategy_epoch(tmp_path: Path, written: tuple[Path, dict[str, Any]]) -> None:
    trained(tmp_path, save_strategy="epoch")
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert_same(written[1], trained(tmp_path / "b", resume=tmp_path / "checkpoint-3"))


def test_saving_from_a_callback(tmp_path: Path, written: tuple[Path, dict[str, Any]]) -> None:
    """The weights on disk are those after the step, not somewhere in between."""
    trainer = ouroboros(tmp_path)
    trainer.add_callback(AtStep(4, lambda: trainer.save_model(str(tmp_path / "copy"))))
    trainer.train()
    fourth = AutoModelForCausalLM.from_pretrained(written[0] / "checkpoint-4")
    assert_same(dict(fourth.state_dict()), dict(AutoModelForCausalLM.from_pretrained(tmp_path / "copy").state_dict()))


def test_a_second_run_into_the_same_folder_replaces_checkpoints(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, learning_rate=1e-3, **options)
    second = trained(tmp_path, **options)
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "checkpoint-6"]
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-6")
    assert_same(outcome(second), trained(tmp_path / "b", resume=tmp_path / "checkpoint-3"))


def test_the_trainer_can_resume_itself(tmp_path: Path, written: tuple[Path, dict[str, Any]]) -> None:
    trainer = trained(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(written[1], trainer)


def test_resuming_keeps_the_logged_losses(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "schedule": "reference"}
    whole = trained(tmp_path, **options)
    resumed = trained(tmp_path, resume=tmp_path / "checkpoint-3", **options)
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_checkpoint_holds_the_arguments(tmp_path: Path) -> None:
    trainer: OuroborosTrainer = trained(tmp_path, save_strategy="steps", save_steps=6)
    saved = torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert saved.to_dict() == trainer.args.to_dict()
