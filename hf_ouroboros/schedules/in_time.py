"""List scheduling: devices at work in simulated time, each of which takes up the most urgent of what is ready whenever it is free."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def work_in_time(
    devices: int,
    plan: Callable[[int], tuple[float, Item] | None],
    do: Callable[[int, float, Item], Iterable[int]],
) -> None:
    """Does all there is to do, what begins first first.

    Args:
        devices: how many there are.
        plan: device -> when it can go on, and with what; None if nothing is known to come.
        do: (device, start, item) -> the devices for which doing the item changes something.
    """
    plans: dict[int, tuple[float, Item]] = {}
    waiting: list[tuple[float, int]] = []
    changed: Iterable[int] = range(devices)
    while True:
        for device in sorted(changed):
            plans.pop(device, None)
            if (found := plan(device)) is not None:
                plans[device] = found
                heapq.heappush(waiting, (found[0], device))
        if not plans:
            return
        # What is first in time cannot be overtaken by what is not known yet.
        start, device = heapq.heappop(waiting)
        changed = ()
        if device in plans and plans[device][0] == start:
            changed = do(device, start, plans[device][1])
