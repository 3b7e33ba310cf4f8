"""The schedules of torch.distributed.pipelining that compete: where their stages lie, and what they demand.

Four stages on two devices:      round (torch-zb)         V (torch-zbv, torch-dualpipev)
    device 0                     stages 0, 2              stages 0, 3
    device 1                     stages 1, 3              stages 1, 2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed import pipelining


def _anything(micro_batches: int, num_devices: int) -> str | None:
    """Nothing is demanded."""
    return None


def _one_per_device(micro_batches: int, num_devices: int) -> str | None:
    return _least(micro_batches, num_devices, "device")


def _one_per_stage(micro_batches: int, num_devices: int) -> str | None:
    return _least(micro_batches, 2 * num_devices, "stage")


def _least(micro_batches: int, least: int, of_what: str) -> str | None:
    return None if micro_batches >= least else f"it needs a micro-batch per {of_what}; use M={least} or more"


def _equal_rounds(micro_batches: int, num_devices: int) -> str | None:
    """Rounds of about D micro-batches, of equal size."""
    rounds = max(1, micro_batches // num_devices)
    if micro_batches % rounds == 0:
        return None
    return f"its {micro_batches} micro-batches don't make {rounds} equal rounds; use a multiple of {num_devices}"


@dataclass(frozen=True)
class Pipeline:
    """A schedule of torch.distributed.pipelining.

    Args:
        schedule: name of its class.
        stages_per_device: how many stages every process has.
        is_v: whether the stages go to the last device and come back, so that the first device has both ends; else they go
            round.
        complaint: (M, D) -> why it can't do that, None where it can.
    """

    schedule: str
    stages_per_device: int = 1
    is_v: bool = False
    complaint: Callable[[int, int], str | None] = _anything

    @property
    def schedule_class(self) -> type | None:
        """The class, where this torch has it."""
        return getattr(pipelining, self.schedule, None)

    def placement(self, num_devices: int) -> list[int]:
        """The device of every stage."""
        there = list(range(num_devices))
        return there + there[::-1] if self.is_v else there * self.stages_per_device

    def obstacle(self, micro_batches: int, num_devices: int) -> str | None:
        """Why it cannot run with this torch, M and number of devices; None where it can."""
        if self.schedule_class is None:
            return f"torch {torch.__version__} has no {self.schedule}"
        return self.complaint(micro_batches, num_devices)


PIPELINES = {
    "torch-gpipe": Pipeline("ScheduleGPipe"),
    "torch-1f1b": Pipeline("Schedule1F1B", complaint=_one_per_device),
    "torch-zb": Pipeline("ScheduleInterleavedZeroBubble", 2, complaint=_equal_rounds),
    "torch-zbv": Pipeline("ScheduleZBVZeroBubble", 2, is_v=True),
    "torch-dualpipev": Pipeline("ScheduleDualPipeV", 2, is_v=True, complaint=_one_per_stage),
}
"""By the name of the contender."""
