"""The engine over processes against the oracle: bit for bit for one replica, to rounding for several."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from engine_runs import reference_result, run_all
from helpers import Case, differences
from trainer_helpers import EVERY

SCHEDULES = ["pipelined", "lockstep", "1f1b", "zero_bubble"]


def check_all(processes: int, runs: list[tuple[Case, str, dict]]) -> None:
    for found, run in zip(run_all(processes, runs), runs, strict=True):
        assert differences(reference_result(*run), found) == [], run


@pytest.mark.slow
@pytest.mark.parametrize("stages", [3, 4, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_reference(stages: int, tied: bool) -> None:
    processes = stages - tied
    if processes == 5:
        pytest.skip("untied K=5 runs on four processes below")
    variants = [
        Case(stages, tied=tied),
        Case(stages, updates=(2, 2, 3, 1), tied=tied, dropout=0.1, padded=True, clip=0.5),
        Case(stages, updates=(1, 4, 4, 2), tied=tied, optimizer="sgd", warmup=1, recompute=True, dropout=0.1),
    ]
    runs = [(case, schedule, {}) for case in variants for schedule in SCHEDULES]
    if stages > 3 and not EVERY:  # each of them tied or untied, under two schedules, all four together
        runs = [(v, s, {}) for i, v in enumerate(variants[tied : 2 + tied]) for s in SCHEDULES[i::2]]
    check_all(processes, runs)


@pytest.mark.slow
def test_weights_of_now() -> None:
    looks = {0: "settle", 2: "state", 3: "synchronize"}
    cases = [
        Case(4, updates=(1, 2, 1, 2, 1), dropout=0.1, padded=True, warmup=1, weights="now"),
        Case(3, updates=(1,) * 6, tied=False, clip=0.5, weights="now"),
        Case(5, updates=(2,) * 4, tied=False, devices=3, weights="now"),
    ]
    schedules = ("pipelined", "lockstep") if EVERY else ("pipelined",)
    check_all(3, [(case, schedule, looks) for case in cases for schedule in schedules])


@pytest.mark.slow
def test_scaled_losses() -> None:
    """Of which some overflow; every process decides on the scale by itself."""
    looks = {3: "settle", 6: "state", 7: "synchronize"}
    case = Case(3, updates=(2,) * 9, scale=2.0**19, interval=2, dropout=0.1, padded=True, clip=0.5)
    check_all(2, [(case, schedule, looks) for schedule in (SCHEDULES if EVERY else SCHEDULES[::3])])


@pytest.mark.slow
def test_scaled_losses_of_replicas() -> None:
    """What overflows in one replica is in the mean of all, so that all drop it."""
    case = Case(2, updates=(2,) * 4, scale=2.0**10, clip=0.5, optimizer="sgd")
    runs = [(case, schedule, {}) for schedule in ("pipelined", "1f1b")]
    large = [(dataclasses.replace(case, scale=2.0**24), schedule, {}) for _, schedule, _ in runs]
    *found, first, second = run_all(2, runs + large, replicas=2)
    for result, run in zip(found, runs, strict=True):  # float16 rounds the halves of a batch otherwise than the whole
        torch.testing.assert_close(result["weights"], reference_result(*run)["weights"], rtol=1e-2, atol=2e-3)
    start = case.model().state_dict()
    for result in (first, second):
        assert all(torch.equal(value, start[name]) for name, value in result["weights"].items())


@pytest.mark.slow
def test_stages_that_share_a_device() -> None:
    """Five untied stages on four processes, and on two: neighbours hand over within a process."""
    cases = [Case(5, updates=(2,) * 4, tied=False, devices=devices) for devices in (4, 2)]
    check_all(4, [(cases[0], schedule, {}) for schedule in (SCHEDULES if EVERY else SCHEDULES[::3])])
    check_all(2, [(cases[1], schedule, {}) for schedule in SCHEDULES])


@pytest.mark.slow
def test_stages_anywhere() -> None:
    """Several stages per process, neighbours together or not, the ends of a tied model in one."""
    tied = Case(5, (2, 1, 3), True, 0.1, layers=6, counts=(0, 2, 1, 3, 0), placement=(0, 1, 1, 0, 0))
    round_robin = Case(6, (1, 3, 4), False, 0.1, clip=0.5, layers=6, counts=(1,) * 6, placement=(0, 1, 2, 0, 1, 2))
    mixed = Case(6, (2, 3, 2), True, layers=6, counts=(0, 2, 1, 1, 2, 0), placement=(0, 1, 2, 0, 2, 0))
    check_all(2, [(tied, schedule, {1: "state"}) for schedule in SCHEDULES])
    check_all(3, [(round_robin, schedule, {1: "state"}) for schedule in SCHEDULES[::3]] + [(mixed, "pipelined", {})])


@pytest.mark.slow
def test_global_clipping_and_the_papers_tied_gradient() -> None:
    cases = [
        (Case(4, updates=(2,) * 4, clip=0.3, scope="global"), "lockstep", {}),
        (Case(4, updates=(2,) * 4, clip=0.3, scope="global"), "1f1b", {}),
        (Case(4, updates=(4, 2, 3), clip=0.3, scope="global", dropout=0.1), "zero_bubble", {}),
        (Case(4, updates=(2,) * 4, tied_gradient="paper", dropout=0.1), "lockstep", {}),
    ]
    check_all(3, cases)


@pytest.mark.slow
def test_looking_changes_nothing() -> None:
    looks = {0: "synchronize", 2: "norm", 3: "settle", 4: "state"}
    check_all(2, [(Case(updates=(2,) * 6, dropout=0.1), schedule, looks) for schedule in SCHEDULES])


@pytest.mark.slow
@pytest.mark.parametrize("stages", [3, 4])
def test_replicas_equal_the_reference_on_the_doubled_batch(stages: int) -> None:
    if stages == 4:
        case = Case(4, updates=(2, 1, 2), devices=2, tied=False, padded=True, clip=0.5, optimizer="sgd")
    else:
        case = Case(3, updates=(2, 1, 2, 2), clip=0.5, optimizer="sgd")
    runs = [(case, schedule, {1: "state"}) for schedule in SCHEDULES]
    runs += [(dataclasses.replace(case, weights="now"), "pipelined", {1: "state"})]
    for found, run in zip(run_all(4, runs, replicas=2), runs, strict=True):
        expected = reference_result(*run)
        # The replicas' halves are summed in another order than the rows of one batch. (SGD, because Adam would blow up the
        # rounding of gradients that are zero by symmetry, such as those of key biases.)
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-6)
        assert found["ticks"] == expected["ticks"]
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found["losses"], expected["losses"], strict=True))
