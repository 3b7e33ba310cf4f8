"""Schedules as pure generators: what each device does, in which order. No torch, no threads, no clock.

The engine feeds every device the same sequence of *slots*. A slot is one beat of the pipeline: usually one tick
(micro-batch), sometimes a bubble, and it may close an update. `slot.trail[d]` is the tick d slots ago, so stage k,
whose delay is d = K-1-k, runs in each slot

    Forward(k, trail[0])   Backward(k, trail[d])   [Step(k, update)]

which is the update rule of the reference, stage by stage. K = 3, one tick per update (columns are slots):

    stage 0   F0       F1       F2 B0 S  F3 B1 S  F4 B2 S
    stage 1   F0       F1 B0 S  F2 B1 S  F3 B2 S  F4 B3 S
    stage 2   F0 B0 S  F1 B1 S  F2 B2 S  F3 B3 S  F4 B4 S

A synchronous update (`1f1b`, delay warm-up) ends with K-1 bubbles before its Step: the same rule then gives the
one-forward-one-backward order and delay 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

# Every schedule is a way to execute the same update rule; `reference` is the rule itself.
SCHEDULES = ("reference", "lockstep", "pipelined", "1f1b")


@dataclass(frozen=True)
class Slot:
    """One beat of the pipeline.

    Args:
        trail: the ticks of this slot and of the K-1 slots before it, newest first; None for a bubble.
        update: the update that closes with this slot, if one does.
    """

    trail: tuple[int | None, ...]
    update: int | None = None

    @property
    def tick(self) -> int | None:
        """The micro-batch that enters here; None for a bubble."""
        return self.trail[0]


@dataclass(frozen=True)
class Pause:
    """In the slot sequence: every stage catches up with the last slot; pending backwards stay pending."""

    settle: bool = False


@dataclass(frozen=True)
class Forward:
    """Forward of a micro-batch through a stage, with the newest weights."""

    stage: int
    tick: int


@dataclass(frozen=True)
class Backward:
    """Backward of a micro-batch through a stage, with the weights of its forward."""

    stage: int
    tick: int


@dataclass(frozen=True)
class Step:
    """Optimizer step of a stage with the gradients of its window."""

    stage: int
    update: int


@dataclass(frozen=True)
class Exchange:
    """All devices tell each other their stages' gradient norms (global clipping)."""

    update: int


@dataclass(frozen=True)
class Rendezvous:
    """All devices wait for each other."""


@dataclass(frozen=True)
class Settle:
    """Run all pending backwards of a stage and keep their gradients, queued, not applied."""

    stage: int


@dataclass(frozen=True)
class Report:
    """Tell the engine that this device reached a pause."""


Instruction = Forward | Backward | Step | Exchange | Rendezvous | Settle | Report
Program = Callable[[Iterable[Slot | Pause]], Iterator[Instruction]]


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
        self._trail: deque[int | None] = deque([None] * num_stages, maxlen=num_stages)
        self._held: bool = False

    def next_tick(self) -> tuple[int, list[Slot]]:
        """Opens a tick; returns its number and the slot before it, now known not to close an update."""
        slots = self._release(None)
        if self.delay_start is None and not self.is_synchronous(self.update):
            self.delay_start = self.tick
        self._trail.appendleft(self.tick)
        self._held = True
        self.tick += 1
        return self.tick - 1, slots

    def close_update(self) -> tuple[int, list[Slot]]:
        """Closes the update after the newest tick; returns its number and the slots that are now complete."""
        update = self.update
        if self.num_stages > 1 and self.is_synchronous(update):
            slots = self._release(None)
            for remaining in reversed(range(self.num_stages - 1)):
                self._trail.appendleft(None)
                slots.append(Slot(tuple(self._trail), update if remaining == 0 else None))
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
                self._trail.appendleft(None)
                slots.append(Slot(tuple(self._trail)))
        return slots

    def resume(self, tick: int, update: int, delay_start: int | None) -> None:
        """Continues at an update boundary: ticks from `delay_start` on may still have gradients to come."""
        self.tick, self.update, self.first_tick_of_update, self.delay_start = tick, update, tick, delay_start
        oldest = tick if delay_start is None else delay_start
        trail = [t if t >= oldest else None for t in range(tick - 1, tick - 1 - self.num_stages, -1)]
        self._trail = deque(trail, maxlen=self.num_stages)
        self._held = False

    def _release(self, update: int | None) -> list[Slot]:
        held, self._held = self._held, False
        return [Slot(tuple(self._trail), update)] if held else []


def _halves(stage: int, slot: Slot, num_stages: int) -> tuple[list[Instruction], list[Instruction]]:
    """What a stage does in a slot: its forward, and its backward with the step after it."""
    forward: list[Instruction] = [] if slot.tick is None else [Forward(stage, slot.tick)]
    rest: list[Instruction] = []
    if (tick := slot.trail[num_stages - 1 - stage]) is not None:
        rest.append(Backward(stage, tick))
    if slot.update is not None:
        rest.append(Step(stage, slot.update))
    return forward, rest


def dataflow_program(stages: Sequence[int], lags: Sequence[int], num_stages: int, exchange: bool = False) -> Program:
    """A device of `pipelined` or `1f1b`: every stage keeps its own order and waits for nothing but its inputs.

    Args:
        stages: the device's stages.
        lags: how many half slots (forward, backward-and-step) each of them stays behind the newest slot; this
            interleaves the stages of one device.
        num_stages: K.
        exchange: whether norms are exchanged before every step (global clipping).
    """
    order = sorted(zip(stages, lags, strict=True), reverse=True)

    def catch_up(waiting: dict[int, deque[list[Instruction]]]) -> Iterator[Instruction]:
        # As if empty slots followed: the order that the simulation found free of deadlocks goes on to the end.
        ahead = 0
        while any(waiting.values()):
            ahead += 2
            for stage, lag in order:
                while len(waiting[stage]) > max(lag - ahead, 0):
                    yield from waiting[stage].popleft()

    def program(slots: Iterable[Slot | Pause]) -> Iterator[Instruction]:
        waiting: dict[int, deque[list[Instruction]]] = {stage: deque() for stage in stages}
        for slot in slots:
            if isinstance(slot, Pause):
                yield from catch_up(waiting)
                if slot.settle:
                    yield from (Settle(stage) for stage, _ in order)
                yield Report()
                continue
            exchanging = exchange and slot.update is not None
            for stage, _ in order:
                forward, rest = _halves(stage, slot, num_stages)
                waiting[stage].extend((forward, rest[:-1] if exchanging else rest))
            if exchanging:
                yield from catch_up(waiting)
                yield Exchange(slot.update)
                yield from (Step(stage, slot.update) for stage, _ in order)
                continue
            for stage, lag in order:
                while len(waiting[stage]) > lag:
                    yield from waiting[stage].popleft()

    return program


def lockstep_program(stages: Sequence[int], num_stages: int, exchange: bool = False) -> Program:
    """A device of the paper's schedule: forward through all stages in turn, then all backwards at once."""
    up, down = sorted(stages), sorted(stages, reverse=True)

    def program(slots: Iterable[Slot | Pause]) -> Iterator[Instruction]:
        for slot in slots:
            if isinstance(slot, Pause):
                if slot.settle:
                    yield from (Settle(stage) for stage in down)
                yield Report()
                continue
            for stage in up:
                yield from _halves(stage, slot, num_stages)[0]
            yield Rendezvous()
            rest = [_halves(stage, slot, num_stages)[1] for stage in down]
            yield from (i for half in rest for i in half if isinstance(i, Backward))
            if exchange and slot.update is not None:
                yield Exchange(slot.update)
            yield from (i for half in rest for i in half if isinstance(i, Step))
            yield Rendezvous()

    return program


def stages_by_device(placement: Sequence[int]) -> list[list[int]]:
    """[stages of device 0, stages of device 1, ...]."""
    return [[k for k, d in enumerate(placement) if d == device] for device in range(max(placement) + 1)]
