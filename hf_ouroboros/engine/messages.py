"""Messages: what the engine hands its workers, and what they report to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch

from ..errors import WorkerError
from ..schedules.clock import Slot
from .settings import FinishedLoss, Hyperparameters
from .streams import Segment


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch with what its forwards need.

    Args:
        batch: its tensors, as workers may use them.
        context: handed to the loss function.
        delayed: whether it belongs to an update with delays.
        opened: that update, with its hyper-parameters when it opened, where forwards use predicted weights; else None.
        segment: its place in a stream; None for none.
        made: the events of `handed_over`.
        scale: of its loss; None for none.
    """

    batch: Mapping[str, Any]
    context: Any
    delayed: bool
    opened: tuple[int, Hyperparameters] | None
    segment: Segment | None
    made: Mapping[torch.device, torch.Event]
    scale: float | None = None


@dataclass(frozen=True)
class Work:
    """A slot with what it carries.

    Args:
        slot: of all devices.
        micro_batch: the one that enters; None in a bubble.
        hyperparameters: of the update that closes; None where none does.
    """

    slot: Slot
    micro_batch: MicroBatch | None = None
    hyperparameters: Hyperparameters | None = None


@dataclass(frozen=True)
class ForwardStarted:
    """The first stage of this process has executed the forward of a tick."""

    tick: int


@dataclass(frozen=True)
class StepDone:
    """A stage has closed an update; norm of its gradients before clipping, None if it had none."""

    stage: int
    update: int
    norm: SupportsFloat | None


@dataclass(frozen=True)
class Paused:
    """A device reached the pause that the engine asked for."""

    device: int


Reported = FinishedLoss | ForwardStarted | StepDone | Paused | WorkerError
"""What workers report."""
