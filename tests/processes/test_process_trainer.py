"""OuroborosTrainer over processes: the reference's numbers, and everything logged once."""

from __future__ import annotations

from pathlib import Path

from trainer_helpers import differing, split_options
from trainer_runs import run_all, run_here


def test_equals_the_reference(tmp_path: Path) -> None:
    runs = [{"options": {"schedule": s, "num_stages": 3}, "name": s} for s in ("pipelined", "lockstep")]
    expected = run_here(tmp_path, {"options": {"schedule": "reference", **split_options(3, 2)}, "name": "reference"})
    for found in run_all(tmp_path, 2, runs):
        for key in ("weights", "optimizer", "groups", "step", "flos"):
            assert differing(expected[key], found[key]) == [], key
