"""Process groups that are used again: every gloo group has threads and sockets of its own, for as long as it lives.

A *standing* group serves all trainers and engines of a process; what goes over it cannot be taken for somebody else's,
even after a failure. A *leased* group belongs to one engine, which gives it back where all processes have ended cleanly;
after a failure, in which one process may have sent what another never took, it is not used again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch.distributed as dist

Make = Callable[[], dist.ProcessGroup]


@dataclass(frozen=True)
class Lease:
    """A group that nobody else uses, until `end`."""

    group: dist.ProcessGroup
    _free: list[dist.ProcessGroup]

    def end(self, drained: bool) -> None:
        """To be called by all processes at the same point, once.

        Args:
            drained: whether nothing is on its way over the group; else it is never used again.
        """
        if drained:
            self._free.append(self.group)


class GroupPool:
    """The groups of one process. All processes make the same calls in the same order."""

    def __init__(self) -> None:
        self._world: dist.ProcessGroup | None = None
        self._standing: dict[Hashable, dist.ProcessGroup] = {}
        self._free: dict[Hashable, list[dist.ProcessGroup]] = {}

    def standing(self, key: Hashable, make: Make) -> dist.ProcessGroup:
        """The one group of this key, made at the first call."""
        self._forget_former_worlds()
        if key not in self._standing:
            self._standing[key] = make()
        return self._standing[key]

    def lease(self, key: Hashable, make: Make) -> Lease:
        """A group of this key for oneself; one that was given back, if there is any."""
        self._forget_former_worlds()
        free = self._free.setdefault(key, [])
        return Lease(free.pop() if free else make(), free)

    def _forget_former_worlds(self) -> None:
        """Groups end with the default group that they were made under."""
        if self._world is not dist.group.WORLD:
            self._world = dist.group.WORLD
            self._standing.clear()
            self._free.clear()


POOL = GroupPool()
