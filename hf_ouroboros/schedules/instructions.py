"""What a device can be told to do, one thing at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .clock import Pause, Slot


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
class InputGradient(Backward):
    """The part of a backward that the stage before waits for, where it is done on its own."""


@dataclass(frozen=True)
class WeightGradient:
    """The rest of a backward, for which no other stage waits."""

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


Instruction = Forward | Backward | WeightGradient | Step | Exchange | Rendezvous | Settle | Report
Program = Callable[[Iterable[Slot | Pause]], Iterator[Instruction]]
"""What one device does, for the slots that it is fed."""
