"""Which process is which device of which replica, and the process groups for whatever is not a stage's tensor.

Four processes, two replicas of two devices:

              device 0   device 1
    replica 0  rank 0     rank 1      a row shares its batches: the same pipeline
    replica 1  rank 2     rank 3      a column shares its stages: their gradients are averaged
"""

from __future__ import annotations

import atexit
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UnsupportedOptionError
from .groups import POOL, Lease


@dataclass(frozen=True)
class ProcessGrid:
    """The processes of a run, seen from one of them.

    Args:
        rank: this process.
        world_size: how many there are.
        replicas: R; processes of one replica have consecutive ranks.
        device: the torch device of this process.
        timeout: how long any process waits for another one.

    Raises:
        UnsupportedOptionError: the processes can't be divided among the replicas.
    """

    rank: int
    world_size: int
    replicas: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=30)

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.world_size % self.replicas:
            raise UnsupportedOptionError(
                f"data_parallel_replicas={self.replicas} does not divide the {self.world_size} processes of this launch; "
                "every replica needs the same number of devices"
            )

    @property
    def num_devices(self) -> int:
        """Devices, that is processes, of one replica."""
        return self.world_size // self.replicas

    @property
    def device_index(self) -> int:
        """Which device of its replica this process is."""
        return self.rank % self.num_devices

    @property
    def replica(self) -> int:
        """Which replica this process belongs to."""
        return self.rank // self.num_devices

    def rank_of(self, device_index: int, replica: int | None = None) -> int:
        """Rank of a device of a replica, by default of this one."""
        return (self.replica if replica is None else replica) * self.num_devices + device_index

    def row(self, replica: int | None = None) -> list[int]:
        """Ranks of a replica."""
        return [self.rank_of(d, replica) for d in range(self.num_devices)]

    def column(self, device_index: int | None = None) -> list[int]:
        """Ranks that hold the same stages, one per replica."""
        index = self.device_index if device_index is None else device_index
        return [self.rank_of(index, r) for r in range(self.replicas)]

    # Every process has to ask for every group, in the same order.

    def standing_group(self, shape: str, purpose: str) -> dist.ProcessGroup:
        """A group that serves this process as long as it lives; called by all processes at the same point.

        Args:
            shape: "world" for all processes, "row" for this replica's, "column" for those with the same stages. A column
                carries tensors, over the backend of the device; the others use gloo.
            purpose: a name under which the same group is found again.
        """
        return POOL.standing((*self._key(shape), purpose), lambda: self._new_group(shape))

    def lease_group(self, shape: str) -> Lease:
        """A group for oneself; `shape` as in `standing_group`."""
        return POOL.lease(self._key(shape), lambda: self._new_group(shape))

    @property
    def tensor_backend(self) -> str:
        """What carries tensors on this device: "nccl" or "gloo"."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    def _key(self, shape: str) -> tuple[Any, ...]:
        return shape, self.replicas, self.tensor_backend, self.timeout

    def _new_group(self, shape: str) -> dist.ProcessGroup:
        members = {
            "world": [list(range(self.world_size))],
            "row": [self.row(r) for r in range(self.replicas)],
            "column": [self.column(d) for d in range(self.num_devices)],
        }
        backend = self.tensor_backend if shape == "column" else "gloo"
        own: Any = None
        for ranks in members[shape]:
            group = dist.new_group(ranks, timeout=self.timeout, backend=backend)
            if self.rank in ranks:
                own = group
        return own


def leave_at_exit() -> None:
    """Has the process groups end while Python still runs: gloo's threads would abort a process that ends before them."""
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
