"""Delay compensation over processes: the reference's numbers, and checkpoints that cross over."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_runs import reference_result, run_all
from helpers import Case, differences
from trainer_helpers import differing, split_options
from trainer_runs import run_all as train_all
from trainer_runs import run_here


@pytest.mark.slow
def test_equals_the_reference() -> None:
    runs = [
        (Case(3, updates=(1,) * 6, optimizer="muon", compensation="weight_prediction+lr_rescale"), "pipelined", {}),
        (Case(3, updates=(2, 2, 1, 2), compensation="weight_prediction", clip=0.5, warmup=1), "lockstep", {}),
        (Case(3, updates=(1,) * 6, optimizer="nesterov", compensation="gap_aware"), "pipelined", {2: "state"}),
        (
            Case(3, updates=(1,) * 6, optimizer="measured muon", compensation="weight_prediction"),
            "lockstep",
            {2: "state"},
        ),
        (Case(3, updates=(1,) * 6, optimizer="sgd", compensation="error_feedback"), "pipelined", {}),
    ]
    for found, run in zip(run_all(2, runs), runs, strict=True):
        assert differences(reference_result(*run), found) == [], run


@pytest.mark.slow
def test_checkpoints_cross_over(tmp_path: Path) -> None:
    """From threads to processes and back, with momentum and history in the optimizer's state."""
    for name in ("muon+weight_prediction", "basis_rotation+gap_aware"):
        folder = tmp_path / name
        saving = {"save_strategy": "steps", "save_steps": 2, "num_stages": 3, "gradient_accumulation_steps": 1}
        saving |= {"delay_compensation": name, "num_train_epochs": 1}
        threads = {"options": saving | split_options(3, 2), "name": "threads"}
        expected = run_here(folder, threads)
        processes = {"options": saving, "name": "processes"}
        resumed = {"options": saving, "name": "resumed", "resume": str(folder / "threads" / "checkpoint-2")}
        found = train_all(folder, 2, [processes, resumed])
        back = str(folder / "processes" / "checkpoint-2")
        for run in (*found, run_here(folder, {**threads, "name": "back", "resume": back})):
            for key in ("weights", "optimizer", "groups", "scheduler", "step"):
                assert differing(expected[key], run[key]) == [], (name, key)
