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

    # Every process has to create every group, in the same order.

    def row_group(self) -> dist.ProcessGroup:
        """A new gloo group of this replica's processes; called by all processes at the same point."""
        return self._own_group([self.row(r) for r in range(self.replicas)], "gloo")

    def column_group(self, backend: str | None = None) -> dist.ProcessGroup:
        """A new group of the processes with the same stages; called by all processes at the same point."""
        columns = [self.column(d) for d in range(self.num_devices)]
        return self._own_group(columns, backend or self.tensor_backend)

    def world_group(self) -> dist.ProcessGroup:
        """A new gloo group of all processes; called by all processes at the same point."""
        return dist.new_group(backend="gloo", timeout=self.timeout)

    @property
    def tensor_backend(self) -> str:
        """What carries tensors on this device: "nccl" or "gloo"."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    def _own_group(self, members: list[list[int]], backend: str) -> dist.ProcessGroup:
        own: Any = None
        for ranks in members:
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
