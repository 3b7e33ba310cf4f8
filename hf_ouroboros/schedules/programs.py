"""Programs as pure generators: what each device does, in which order, for the slots that it is fed (`clock.py`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from .clock import Pause, Slot
from .instructions import (
    Backward,
    Exchange,
    Forward,
    Instruction,
    Program,
    Rendezvous,
    Report,
    Settle,
    Step,
)

Beat = list[tuple[int, int]]
"""What a device does in every slot, in this order: (stage, how many half slots it then stays behind the newest slot)."""


def _halves(stage: int, slot: Slot, num_stages: int) -> tuple[list[Instruction], list[Instruction]]:
    """What a stage does in a slot: its forward, and its backward with the step after it."""
    forward: list[Instruction] = [] if slot.tick is None else [Forward(stage, slot.tick)]
    rest: list[Instruction] = []
    if (tick := slot.recent_ticks[num_stages - 1 - stage]) is not None:
        rest.append(Backward(stage, tick))
    if slot.update is not None:
        rest.append(Step(stage, slot.update))
    return forward, rest


def dataflow_program(stages: Sequence[int], offsets: Sequence[int], num_stages: int, exchange: bool = False) -> Program:
    """A device of `pipelined` or `1f1b`: every stage keeps its own order and waits for nothing but its inputs.

    Args:
        stages: the device's stages.
        offsets: how many half slots (forward, backward-and-step) each of them stays behind the newest slot; this
            interleaves the stages of one device.
        num_stages: K.
        exchange: whether norms are exchanged before every step (global clipping).
    """
    return beat_program(sorted(zip(stages, offsets, strict=True), reverse=True), num_stages, exchange)


def beat_program(beat: Beat, num_stages: int, exchange: bool = False) -> Program:
    """The same, in any order of half slots.

    Args:
        beat: what is done in every slot.
        num_stages: K.
        exchange: as in `dataflow_program`.
    """
    stages = sorted({stage for stage, _ in beat}, reverse=True)

    def catch_up(waiting: dict[int, deque[list[Instruction]]]) -> Iterator[Instruction]:
        # As if empty slots followed: the order that the simulation found free of deadlocks goes on to the end.
        ahead = 0
        while any(waiting.values()):
            ahead += 2
            for stage, behind in beat:
                while len(waiting[stage]) > max(behind - ahead, 0):
                    yield from waiting[stage].popleft()

    def program(slots: Iterable[Slot | Pause]) -> Iterator[Instruction]:
        waiting: dict[int, deque[list[Instruction]]] = {stage: deque() for stage in stages}
        for slot in slots:
            if isinstance(slot, Pause):
                yield from catch_up(waiting)
                if slot.settle:
                    yield from (Settle(stage) for stage in stages)
                yield Report()
                continue
            update = slot.update if exchange else None
            for stage in stages:
                forward, rest = _halves(stage, slot, num_stages)
                waiting[stage].extend((forward, rest if update is None else rest[:-1]))
            if update is not None:
                yield from catch_up(waiting)
                yield Exchange(update)
                yield from (Step(stage, update) for stage in stages)
                continue
            for stage, behind in beat:
                while len(waiting[stage]) > behind:
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


def has_simple_devices(stages_of: Sequence[Sequence[int]]) -> bool:
    """Whether devices have a stage each, but for one that may have the first and the last one, too."""
    last = sum(map(len, stages_of)) - 1
    return all(len(stages) == 1 or list(stages) == [0, last] for stages in stages_of)
