"""Keeps account of losses that arrive late: every micro-batch's loss is counted exactly once."""

from __future__ import annotations


class LossLedger:
    """Sums losses per update and hands out means over complete updates.

    A loss may come in some ticks after its update was closed. An update is complete when it is closed and the
    losses of all its micro-batches have come.
    """

    def __init__(self) -> None:
        self._update_of_tick: dict[int, int] = {}
        self._missing: dict[int, int] = {}
        self._sums: dict[int, float] = {}
        self._open = 0

    def open_tick(self, tick: int) -> None:
        """A micro-batch of the open update was submitted."""
        self._update_of_tick[tick] = self._open
        self._missing[self._open] = self._missing.get(self._open, 0) + 1
        self._sums.setdefault(self._open, 0.0)

    def close_update(self) -> None:
        """The open update is closed."""
        self._open += 1

    def add(self, tick: int, loss: float) -> None:
        """The loss of a micro-batch has come."""
        update = self._update_of_tick.pop(tick)
        self._sums[update] += loss
        self._missing[update] -= 1

    def take_mean(self) -> float | None:
        """Mean loss of the updates completed since the last call; None if there are none."""
        complete = [u for u, missing in self._missing.items() if u < self._open and missing == 0]
        for update in complete:
            del self._missing[update]
        sums = [self._sums.pop(update) for update in complete]
        return sum(sums) / len(sums) if sums else None
