"""Events of several hosts on one clock, for a timeline that shows them together."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from ..simulate.timeline import Event
from .files import gather_objects
from .grid import ProcessGrid


@dataclass(frozen=True)
class Recording:
    """What a process recorded, by its host's clock.

    Args:
        host: whose clock it is; processes of one host share a clock.
        now: seconds on that clock at a moment that is the same for all processes.
        events: what was recorded.
    """

    host: str
    now: float
    events: list[Event]


def record_of_all(grid: ProcessGrid, group: dist.ProcessGroup, events: list[Event]) -> list[list[Event]]:
    """Every process's events, by rank, on the clock of rank 0's host; called by all processes at the same point.

    Hosts agree on "now" by leaving a barrier, which is as exact as a message between them is fast.
    """
    dist.barrier(group)
    now = time.perf_counter()
    return on_one_clock(gather_objects(grid, group, Recording(platform.node(), now, events)))


def on_one_clock(recordings: Sequence[Recording]) -> list[list[Event]]:
    """Events of every recording on the first one's clock."""
    first = recordings[0]
    # One offset per host: its processes share a clock, and must not be moved against each other.
    ahead = {recording.host: recording.now - first.now for recording in reversed(recordings)}
    ahead[first.host] = 0.0
    return [
        [replace(e, start=e.start - ahead[r.host], end=e.end - ahead[r.host]) for e in r.events] for r in recordings
    ]
