"""Awaiting: a collective call of the main thread that does not wait for a process that will never come."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

PAUSES = (0.0002, 0.002)
"""Seconds between two looks, the first and the longest."""


def await_others(work: dist.Work, check: Callable[[], None]) -> None:
    """Waits until a collective call is complete.

    Args:
        work: of the call, made with async_op=True.
        check: raises if another process is known to have failed; called while this one waits.
    """
    pause = PAUSES[0]
    while not work.is_completed():
        check()
        time.sleep(pause)
        pause = min(1.5 * pause, PAUSES[1])
    work.wait()


def summed(value: float, group: dist.ProcessGroup, check: Callable[[], None]) -> float:
    """The sum of what all processes of a gloo group give.

    Args:
        value: of this process.
        group: the processes.
        check: as for `await_others`.
    """
    row = torch.tensor([value], dtype=torch.float64)
    await_others(dist.all_reduce(row, group=group, async_op=True), check)
    return row.item()
