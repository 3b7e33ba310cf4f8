"""The ledger counts every late loss exactly once, in its turn, with Trainer's roundings."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_ouroboros.ledger import DueLog, LossLedger


def test_a_log_waits_for_all_its_losses() -> None:
    ledger = LossLedger()
    for tick in (0, 1):
        ledger.open_tick(tick, 0)
    ledger.due(DueLog(step=1, steps=1, update=0, before=1))
    ledger.open_tick(2, 1)
    ledger.add_loss(1, 1.0)
    ledger.add_loss(2, 5.0)
    assert ledger.next_log() is None
    assert ledger.waiting.step == 1
    ledger.add_loss(0, 2.0)
    log, loss, norm = ledger.next_log()
    assert (log.step, loss, norm) == (1, 3.0, None)
    assert ledger.next_log() is None and ledger.waiting is None
    assert ledger.finish() == (3.0, 5.0)


def test_a_norm_is_that_of_its_update() -> None:
    ledger = LossLedger()
    for update in range(3):
        ledger.open_tick(update, update)
        ledger.add_loss(update, 1.0)
        ledger.add_norm(update, f"norm of {update}")
        if update == 1:
            ledger.due(DueLog(step=2, steps=2, update=1, before=2))
    assert ledger.next_log()[2] == "norm of 1"


def test_norms_that_nobody_logs_are_not_kept() -> None:
    ledger = LossLedger()
    for update in range(100):
        ledger.add_norm(update, update)
    assert len(ledger._norms) == 1


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=12),
    st.lists(st.integers(1, 3), min_size=12, max_size=12),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_sums_are_those_of_trainer(losses: list[float], gaps: list[int], without_nan: bool, random) -> None:
    expected, total, running, last = [], 0.0, torch.tensor(0.0), 0
    ledger, arriving = LossLedger(0, without_nan), []
    for step, loss in enumerate(losses):
        value = torch.tensor(loss)
        if without_nan and not torch.isfinite(value):
            running += running / (1 + step - last)
        else:
            running += value
        ledger.open_tick(step, step)
        arriving.append(step)
        if (step + 1) % gaps[step] == 0:
            expected.append(running.item() / (step + 1 - last))
            total += running.item()
            running -= running.clone()
            ledger.due(DueLog(step + 1, step + 1 - last, None, step + 1))
            last = step + 1
    found = []
    random.shuffle(arriving)
    for tick in arriving:
        ledger.add_loss(tick, losses[tick])
        while (log := ledger.next_log()) is not None:
            found.append(log[1])
    assert [repr(x) for x in found] == [repr(x) for x in expected]
    logged, rest = ledger.finish()
    assert repr(rest) == repr(running.item())
    assert repr(logged) == repr(total) or (math.isnan(logged) and math.isnan(total))
