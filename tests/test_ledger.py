"""The ledger counts every late loss exactly once."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from hf_ouroboros.ledger import LossLedger


def test_nothing_to_tell() -> None:
    ledger = LossLedger()
    assert ledger.take_mean() is None
    ledger.open_tick(0)
    assert ledger.take_mean() is None
    ledger.add(0, 3.0)
    assert ledger.take_mean() is None, "the update is still open"
    ledger.close_update()
    assert ledger.take_mean() == 3.0
    assert ledger.take_mean() is None


def test_an_update_counts_when_all_its_losses_have_come() -> None:
    ledger = LossLedger()
    for tick in (0, 1):
        ledger.open_tick(tick)
    ledger.close_update()
    ledger.open_tick(2)
    ledger.close_update()
    ledger.add(1, 1.0)
    ledger.add(2, 5.0)
    assert ledger.take_mean() == 5.0
    ledger.add(0, 2.0)
    assert ledger.take_mean() == 3.0


def test_a_resumed_run_starts_at_any_tick() -> None:
    ledger = LossLedger()
    ledger.open_tick(17)
    ledger.close_update()
    ledger.add(17, 2.0)
    assert ledger.take_mean() == 2.0


def test_not_a_number_shows_up_once() -> None:
    ledger = LossLedger()
    for tick, loss in enumerate([math.nan, 1.0]):
        ledger.open_tick(tick)
        ledger.close_update()
        ledger.add(tick, loss)
        mean = ledger.take_mean()
        assert math.isnan(mean) if tick == 0 else mean == 1.0


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
    st.integers(0, 6),
)
def test_every_loss_once(sizes: list[int], random: object, lag: int) -> None:
    """Losses come up to `lag` ticks late, means are taken now and then: together they are the sum of all."""
    ledger = LossLedger()
    waiting: list[tuple[int, float]] = []
    taken: list[float] = []
    counted, tick = 0, 0

    def take() -> None:
        nonlocal counted
        before = len(ledger._sums)
        mean = ledger.take_mean()
        complete = before - len(ledger._sums)
        counted += complete
        assert (mean is None) == (complete == 0)
        if mean is not None:
            taken.append(mean * complete)

    for size in sizes:
        for _ in range(size):
            ledger.open_tick(tick)
            waiting.append((tick, float(2**tick)))
            tick += 1
            while len(waiting) > lag:
                ledger.add(*waiting.pop(random.randrange(len(waiting))))
        ledger.close_update()
        if random.random() < 0.5:
            take()
    for late in waiting:
        ledger.add(*late)
    take()
    assert counted == len(sizes)
    # Means over three updates, say, round.
    assert math.isclose(sum(taken), 2.0**tick - 1, rel_tol=1e-12)
