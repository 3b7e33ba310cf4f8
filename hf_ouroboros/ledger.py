"""Keeps Trainer's account of losses although they come late: every one counts once, in its turn, for its own step.

Trainer adds up the losses of micro-batches, in single precision, until a log is due; then the sum is divided by the steps since
the last log, and starts anew. Here the same is done as soon as the losses are known, in the same order with the same roundings:

    submitted   0 1 | 2 3 | log | 4 5 | ...        known so far: 0 1 2       the log waits for 3
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np


@dataclass(frozen=True)
class DueLog:
    """A log that Trainer would write now.

    Args:
        step: updates made so far in the run.
        steps: how many of them since the last log.
        update: the engine's number of the update whose gradient norm is logged; None for no norm.
        before: the engine's number of updates that have to be accounted for.
        others: whatever else belongs to the moment.
    """

    step: int
    steps: int
    update: int | None
    before: int
    others: Any = None


class LossLedger:
    """The running sum of the losses of one `train()`.

    Args:
        step: updates made before.
        without_nan: whether losses that are no finite numbers count as the mean of those before.
    """

    def __init__(self, step: int = 0, without_nan: bool = True):
        self._step = step
        self._without_nan = without_nan
        self._sum = np.float32(0.0)
        self._logged_at = step
        self._total = 0.0
        self._turns: deque[tuple[int, int] | DueLog] = deque()
        self._losses: dict[int, SupportsFloat] = {}
        self._unread: deque[int] = deque()  # ticks whose losses may still be on their way from a device
        self._norms: dict[int, Any] = {}
        self._wanted: set[int | None] = set()

    def open_tick(self, tick: int, step: int) -> None:
        """A micro-batch was submitted after so many updates."""
        self._turns.append((tick, step))

    def add_loss(self, tick: int, loss: SupportsFloat) -> None:
        """The loss of a micro-batch has come, or is on its way; it is read when that waits for nothing, or is needed."""
        self._losses[tick] = loss
        self._unread.append(tick)
        while self._unread and getattr(self._losses.get(self._unread[0]), "is_there", True):
            tick = self._unread.popleft()
            if tick in self._losses:
                self._losses[tick] = float(self._losses[tick])

    def add_norm(self, update: int, norm: Any) -> None:
        """The gradient norm of an update has come; of earlier ones, only those are wanted whose logs are due already."""
        self._norms = {u: kept for u, kept in self._norms.items() if u in self._wanted} | {update: norm}

    def norm(self, update: int) -> float:
        """The gradient norm of the newest update, which has come."""
        return self._norms[update].value

    def due(self, log: DueLog) -> None:
        """A log is due, about all micro-batches submitted so far."""
        self._turns.append(log)
        self._wanted.add(log.update)

    @property
    def waiting(self) -> DueLog | None:
        """The first log that is due."""
        return next((turn for turn in self._turns if isinstance(turn, DueLog)), None)

    def next_log(self) -> tuple[DueLog, float, Any] | None:
        """The first log that is due, with its loss and gradient norm; None if there is none whose losses have all come."""
        self._advance()
        log = self._turns[0] if self._turns else None
        if not isinstance(log, DueLog):
            return None
        self._turns.popleft()
        total = float(self._sum)
        with np.errstate(invalid="ignore"):
            self._sum = self._sum - self._sum  # Trainer's way to start anew, which keeps what is no number
        self._total += total
        self._logged_at = log.step
        norm = None if log.update is None else self._norms.get(log.update)
        self._wanted.discard(log.update)
        return log, total / log.steps, norm

    def finish(self) -> tuple[float, float]:
        """At the end, with all losses there: the sum of what was logged, and of what was not."""
        self._advance()
        return self._total, float(self._sum)

    def _advance(self) -> None:
        while self._turns and not isinstance(turn := self._turns[0], DueLog) and turn[0] in self._losses:
            self._turns.popleft()
            tick, step = turn
            loss = np.float32(float(self._losses.pop(tick)))
            with np.errstate(over="ignore", invalid="ignore"):
                if self._without_nan and not np.isfinite(loss):
                    loss = self._sum / np.float32(1 + step - self._logged_at)
                self._sum = self._sum + loss
