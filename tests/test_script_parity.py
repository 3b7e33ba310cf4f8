"""What else of a script is as with stock Trainer: the order of events, callbacks with a state, trials of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_helpers import Rows, assert_same, differing, ouroboros, outcome, split_options, stock, tiny_model, trained
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HPSearchBackend

EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))
OPTIONS: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_steps": 2,
    "max_grad_norm": 0.0,
}
SPLIT = split_options(3, 2)


def told() -> tuple[TrainerCallback, list[tuple[str, int, bool]]]:
    """A callback, and where it writes every event, with the step and whether a log is due."""
    seen: list[tuple[str, int, bool]] = []

    def noting(name: str) -> Any:
        def event(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((name, state.global_step, control.should_log))

        return event

    return type("Told", (TrainerCallback,), {name: noting(name) for name in EVENTS})(), seen


@pytest.mark.parametrize("given", [{"schedule": "1f1b", **SPLIT}, {"num_stages": 1}], ids=str)
def test_events_come_in_stocks_order(tmp_path: Path, given: dict[str, Any]) -> None:
    callback, expected = told()
    stock(tmp_path / "stock", {"callbacks": [callback]}, **OPTIONS).train()
    callback, found = told()
    trained(tmp_path / "found", {"callbacks": [callback], "model": tiny_model(dropout=0.0)}, **OPTIONS, **given)
    assert found == expected and {name for name, *_ in found} >= {"on_log", "on_save", "on_evaluate", "on_substep_end"}


class Counts(TrainerCallback, ExportableState):
    """Counts steps, in what is saved with a checkpoint."""

    def __init__(self, start: int = 0):
        self.start, self.steps = start, start

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"start": self.start}, "attributes": {"steps": self.steps}}


def of_class(trainer: Trainer, cls: type) -> Any:
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, cls))


def test_states_of_callbacks_are_resumed(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}
    whole = trained(tmp_path, {"callbacks": [Counts(10)]}, **saving, **SPLIT)
    assert of_class(whole, Counts).steps == 16
    again = trained(tmp_path, {"callbacks": [Counts()]}, resume=tmp_path / "checkpoint-2", **saving, **SPLIT)
    assert of_class(again, Counts).steps == 16
    assert differing(outcome(whole), outcome(again)) == []


def test_early_stopping_goes_on_where_it_was(tmp_path: Path) -> None:
    """Interrupted after the first evaluation without progress, the run ends where the whole one ends."""

    def worse(prediction: Any) -> dict[str, float]:
        worse.score -= 1
        return {"score": worse.score}

    worse.score = 0.0
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "restore_callback_states_from_checkpoint": True,
    }

    def run(resume: Any = None) -> Trainer:
        given = {"compute_metrics": worse, "callbacks": [EarlyStoppingCallback(early_stopping_patience=3)]}
        return trained(tmp_path, given, resume=resume, **options, **SPLIT)

    whole = run()
    assert whole.state.global_step == 4
    again = run(tmp_path / "checkpoint-2")
    assert again.state.global_step == 4 and again.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert differing(outcome(whole)["weights"], outcome(again)["weights"]) == []


class Trial(dict):
    """What a study hands to Trainer, as far as it looks at it."""

    def __init__(self, number: int, params: dict[str, Any]):
        super().__init__(params)
        self.number, self.params = number, params


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "pipelined"])
def test_trials_of_a_search(tmp_path: Path, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial is a run of its own, from a new model, with its own learning rate and micro-batches."""
    monkeypatch.setattr(
        "transformers.integrations.hp_params", lambda trial: dict(trial.params)
    )  # asks for a study's package
    trials = [{"learning_rate": 0.003}, {"learning_rate": 0.01, "gradient_accumulation_steps": 1}]
    options = {"max_steps": 2, "max_grad_norm": 0.0, "schedule": schedule, **SPLIT}

    def fresh() -> Any:
        return tiny_model(dropout=0.0)

    searching = ouroboros(tmp_path / "search", {"model_init": fresh, "train_dataset": Rows(18)}, **options)
    searching.hp_search_backend, searching.hp_name = HPSearchBackend.OPTUNA, None
    searching.hp_space = lambda trial: trial.params
    for index, trial in enumerate(trials):
        searching.train(trial=Trial(index, trial))
        found = outcome(searching)
        assert_same(outcome(trained(tmp_path / str(index), {"model": fresh()}, **{**options, **trial})), found)
