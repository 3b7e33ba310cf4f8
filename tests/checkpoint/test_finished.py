"""A finished run that is started again stays as it is, and a folder that was moved knows its best model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import in_processes
from test_trainer_resume import BEST, Scores
from torch.utils.data import IterableDataset
from trainer_helpers import AtStep, Rows, assert_same, ouroboros, outcome, trained
from trainer_runs import made

from hf_ouroboros import CheckpointError, CheckpointMismatchError
from hf_ouroboros.checkpoint import load_run_state

SAVING = {"save_strategy": "steps", "save_steps": 2}


class Endless(IterableDataset):
    """Rows without a known number."""

    def __iter__(self) -> Any:
        return iter(Rows(100))


# An epoch has 3 updates.
LENGTHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole epochs": ({}, {}),
    "half an epoch": ({}, {"max_steps": 2}),
    "an epoch and a half": ({}, {"max_steps": 4}),
    "an epoch": ({}, {"max_steps": 3, "save_steps": 3}),
    "a part of an epoch": ({}, {"num_train_epochs": 0.5}),
    "without a length": ({"train_dataset": Endless()}, {"max_steps": 2}),
    "under the reference": ({}, {"max_steps": 2, "schedule": "reference"}),
    "saved with epochs": ({}, {"max_steps": 4, "save_strategy": "epoch"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_started_again(tmp_path: Path, length: str) -> None:
    given, options = LENGTHS[length]
    options = SAVING | options
    expected = outcome(trained(tmp_path, dict(given), **options))
    again = ouroboros(tmp_path, dict(given), **options)
    steps: list[int] = []
    again.add_callback(AtStep(None, lambda: steps.append(again.state.global_step)))
    output = again.train(resume_from_checkpoint=True)
    assert steps == [] and output.global_step == expected["step"]
    assert_same(expected, again)


@pytest.mark.slow
def test_a_shorter_run(tmp_path: Path) -> None:
    """From a checkpoint beyond its end: no update either."""
    trained(tmp_path, **SAVING)
    again = trained(tmp_path / "on", resume=tmp_path / "checkpoint-4", max_steps=2)
    assert again.state.global_step == 4
    assert load_run_state(tmp_path / "checkpoint-4").update == 4


def start_and_restart(rank: int, folder: str) -> bool:
    run = {"options": SAVING | {"num_stages": 3, "max_steps": 2}}
    first = made(folder, run)
    first.train()
    again = made(folder, run)
    again.train(resume_from_checkpoint=True)
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    return again.state.global_step == 2 and all(a.is_meta or torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_over_processes(tmp_path: Path) -> None:
    assert in_processes(2, start_and_restart, str(tmp_path)) == [True, True]


# ---- the best model ----


def best_run(folder: Path, resume: Path | None = None, **options: Any) -> Any:
    """The best of six evaluations is the third; of those after a resume from there, none is better."""
    scores = [0.1, 0.2, 0.5, 0.3, 0.2, 0.1] if resume is None else [0.3, 0.2, 0.1]
    return trained(folder, {"compute_metrics": Scores(scores)}, resume=resume, **(BEST | options))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["best", "steps"])
def test_a_moved_folder(tmp_path: Path, strategy: str) -> None:
    expected = best_run(tmp_path / "old", save_strategy=strategy)
    assert expected.state.best_model_checkpoint == str(tmp_path / "old" / "checkpoint-3")
    expected = outcome(expected)["weights"]
    shutil.move(tmp_path / "old", tmp_path / "new")
    for path in (tmp_path / "new").glob("checkpoint-[456]"):
        shutil.rmtree(path)
    found = best_run(tmp_path / "new", resume=tmp_path / "new" / "checkpoint-3", save_strategy=strategy)
    assert found.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-3")
    assert_same(expected, outcome(found)["weights"])


@pytest.mark.slow
def test_a_copied_folder_takes_its_own(tmp_path: Path) -> None:
    """Whatever has become of the first one's."""
    best_run(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    (tmp_path / "old" / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    found = best_run(tmp_path / "new", resume=tmp_path / "new" / "checkpoint-3")
    assert found.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-3")


@pytest.mark.slow
def test_the_best_is_gone(tmp_path: Path) -> None:
    best_run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-3")
    with pytest.raises(CheckpointMismatchError, match=r"best model so far is gone.*load_best_model_at_end=False"):
        best_run(tmp_path, resume=tmp_path / "checkpoint-5")
    last = best_run(tmp_path / "on", resume=tmp_path / "checkpoint-5", load_best_model_at_end=False)
    assert last.state.global_step == 6


@pytest.mark.slow
def test_the_best_is_damaged(tmp_path: Path) -> None:
    """A flipped bit in what would be the result of the run."""
    trainer = ouroboros(tmp_path, {"compute_metrics": Scores([0.1, 0.2, 0.5, 0.3, 0.2, 0.1])}, **BEST)

    def flip() -> None:
        path = tmp_path / "checkpoint-3" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    trainer.add_callback(AtStep(5, flip))
    with pytest.raises(CheckpointError, match=r"best model, in .*checkpoint-3, is damaged.*model\.safetensors"):
        trainer.train()
    assert trainer.state.global_step == 6
