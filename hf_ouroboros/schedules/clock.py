"""From ticks and updates to slots, the beats of a pipeline, of which every device gets the same sequence.

A slot is usually one tick (micro-batch), sometimes a bubble, and it may close an update. `slot.recent_ticks[d]` is the tick
d slots ago, so stage k, whose delay is d = K-1-k, runs in each slot

    Forward(k, recent_ticks[0])   Backward(k, recent_ticks[d])   [Step(k, update)]

which is the update rule of the reference, stage by stage. K = 3, one tick per update (columns are slots):

    stage 0   F0       F1       F2 B0 S  F3 B1 S  F4 B2 S
    stage 1   F0       F1 B0 S  F2 B1 S  F3 B2 S  F4 B3 S
    stage 2   F0 B0 S  F1 B1 S  F2 B2 S  F3 B3 S  F4 B4 S

A synchronous update (that of a schedule without delays, or of a delay warm-up) ends with K-1 bubbles before its Step: the
same rule then gives the one-forward-one-backward order and delay 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """One beat of the pipeline.

    Args:
        recent_ticks: the ticks of this slot and of the K-1 slots before it, newest first; None for a bubble.
        update: the update that closes with this slot, if one does.
    """

    recent_ticks: tuple[int | None, ...]
    update: int | None = None

    @property
    def tick(self) -> int | None:
        """The micro-batch that enters here; None for a bubble."""
        return self.recent_ticks[0]


@dataclass(frozen=True)
class Pause:
    """In the slot sequence: every stage catches up with the last slot; pending backwards stay pending."""

    settle: bool = False


class Clock:
    """Counts ticks and updates and turns them into slots.

    Args:
        num_stages: K.
        is_synchronous: tells for an update's number whether it ends with a drained pipeline.
    """

    def __init__(self, num_stages: int, is_synchronous: Callable[[int], bool]):
        self.num_stages = num_stages
        self.is_synchronous = is_synchronous
        self.tick = 0
        self.update = 0
        self.first_tick_of_update = 0
        self.delay_start: int | None = None
        self._recent_ticks: deque[int | None] = deque([None] * num_stages, maxlen=num_stages)
        self._kept_back: bool = False

    def next_tick(self) -> tuple[int, list[Slot]]:
        """Opens a tick; returns its number and the slot before it, now known not to close an update."""
        slots = self._release(None)
        if self.delay_start is None and not self.is_synchronous(self.update):
            self.delay_start = self.tick
        self._recent_ticks.appendleft(self.tick)
        self._kept_back = True
        self.tick += 1
        return self.tick - 1, slots

    def close_update(self) -> tuple[int, list[Slot]]:
        """Closes the update after the newest tick; returns its number and the slots that are now complete."""
        update = self.update
        if self.num_stages > 1 and self.is_synchronous(update):
            slots = self._release(None)
            for remaining in reversed(range(self.num_stages - 1)):
                self._recent_ticks.appendleft(None)
                slots.append(Slot(tuple(self._recent_ticks), update if remaining == 0 else None))
        else:
            slots = self._release(update) or [Slot((None,) * self.num_stages, update)]
        self.update += 1
        self.first_tick_of_update = self.tick
        return update, slots

    def interrupt(self) -> list[Slot]:
        """The slot held back until it is known whether it closes an update, released for a pause."""
        return self._release(None)

    def drain(self) -> list[Slot]:
        """As `interrupt`; the micro-batches of an update without delays get to their backwards, too."""
        slots = self._release(None)
        if self.is_synchronous(self.update):
            for _ in range(self.num_stages - 1):
                self._recent_ticks.appendleft(None)
                slots.append(Slot(tuple(self._recent_ticks)))
        return slots

    def resume(self, tick: int, update: int, delay_start: int | None) -> None:
        """Continues at an update boundary: ticks from `delay_start` on may still have gradients to come."""
        self.tick, self.update, self.first_tick_of_update, self.delay_start = tick, update, tick, delay_start
        oldest = tick if delay_start is None else delay_start
        recent_ticks = [t if t >= oldest else None for t in range(tick - 1, tick - 1 - self.num_stages, -1)]
        self._recent_ticks = deque(recent_ticks, maxlen=self.num_stages)
        self._kept_back = False

    def _release(self, update: int | None) -> list[Slot]:
        kept_back, self._kept_back = self._kept_back, False
        return [Slot(tuple(self._recent_ticks), update)] if kept_back else []
