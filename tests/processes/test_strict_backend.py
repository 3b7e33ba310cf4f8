"""Over a backend with NCCL's rules: no deadlock, the reference's numbers, in every schedule and placement."""

from __future__ import annotations

from typing import Any

import pytest
import strict_backend
from engine_runs import reference_result, run_part, whole
from helpers import Case, differences
from rig import Ended, ends_of, in_processes
from strict_backend import use_strict_backend

from hf_ouroboros.processes.channels import Channels

SCHEDULES = ["pipelined", "lockstep", "1f1b", "zero_bubble"]


def part(rank: int, *args: Any) -> Any:
    """As `run_part`, over the strict backend."""
    use_strict_backend()
    return run_part(rank, *args)


def part_without_connecting(rank: int, *args: Any) -> Any:
    """As `part`, with communicators that connect at their first message, receives being posted early."""
    Channels._connect = lambda self, direction, stage: None
    Channels.posts_early = True
    strict_backend.DEADLOCK = 4.0
    return part(rank, *args)


def check_all(processes: int, cases: list[Case], looks: dict | None = None) -> None:
    """The first case under all schedules, the others under every second."""
    runs = [(case, schedule, looks or {}) for i, case in enumerate(cases) for schedule in SCHEDULES[:: 1 + (i > 0)]]
    parts = in_processes(processes, part, processes, runs, 1)
    for i, run in enumerate(runs):
        found = whole([found[i] for found in parts], processes)
        assert differences(reference_result(*run), found) == [], run


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_equals_the_reference(stages: int) -> None:
    cases = [
        Case(stages, updates=(2, 2, 3, 1), tied=False, dropout=0.1, padded=True, clip=0.5),
        Case(stages, updates=(1, 4, 2), tied=False, recompute=True, warmup=1),
        *([Case(stages, updates=(1, 2, 1), tied=False, weights="now")] if stages == 3 else []),
    ]
    check_all(stages, cases)


@pytest.mark.slow
def test_a_device_with_the_first_and_the_last_stage() -> None:
    check_all(2, [Case(3, updates=(2, 2, 1), tied=True, dropout=0.1)])


@pytest.mark.slow
def test_five_stages_on_two_and_four_processes() -> None:
    check_all(2, [Case(5, updates=(2,) * 3, tied=False, devices=2)])
    check_all(4, [Case(5, updates=(2,) * 3, tied=True)])


@pytest.mark.slow
def test_looking_changes_nothing() -> None:
    check_all(2, [Case(updates=(2,) * 5, dropout=0.1)], {0: "synchronize", 2: "norm", 3: "settle", 4: "state"})


@pytest.mark.slow
def test_the_backend_finds_what_deadlocks() -> None:
    run = (Case(3, updates=(2, 2), tied=False), "pipelined", {})
    ends = ends_of(3, part_without_connecting, 3, [run], 1)
    assert any(isinstance(end, Ended) and "DEADLOCK" in end.text for end in ends)
