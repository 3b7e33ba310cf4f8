"""A clock that is read after every update and stands still while a model is evaluated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch


@dataclass
class Clock:
    """When every update ended and what the validation loss was, on a clock that stands still during evaluations.

    Args:
        times: seconds at the end of every update.
        memory: resident bytes of this process at the same moments.
        evaluations: (update, seconds, validation loss).
    """

    times: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    _zero: float = field(default_factory=time.perf_counter)
    _stopped_at: float | None = None

    def now(self) -> float:
        """Seconds since the clock was made or set to zero, without pauses."""
        return (time.perf_counter() if self._stopped_at is None else self._stopped_at) - self._zero

    def restart(self) -> None:
        """Sets the clock to zero."""
        self._zero = time.perf_counter()

    def update_ended(self) -> None:
        """Takes note of an update."""
        self.times.append(self.now())
        self.memory.append(psutil.Process().memory_info().rss)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._stopped_at = time.perf_counter()
        yield
        self._zero += time.perf_counter() - self._stopped_at
        self._stopped_at = None
