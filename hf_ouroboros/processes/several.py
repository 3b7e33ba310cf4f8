"""SeveralProcesses: a run in which every process is one device, seen from one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from ..checkpoint.hashes import FileHashes
from ..engine.core import Engine
from ..engine.losses import LossFunction
from ..engine.settings import EngineSettings
from ..partition import OwnDevice, Partition
from ..simulate.timeline import Timeline
from . import files as shared_files
from .accelerator import ReplicaAccelerator
from .awaiting import summed
from .channels import BoundarySpec
from .clocks import record_of_all
from .grid import ProcessGrid, leave_at_exit
from .handshake import Facts
from .meeting import present
from .probe import boundary_specs, with_gradients
from .process_parts import parts_of_process
from .processes import Processes
from .relay import AheadLoader, Relay
from .same_batches import SameBatches
from .watch import Watch

if TYPE_CHECKING:
    from ..arguments import OuroborosArguments

T = TypeVar("T")


def meet(args: OuroborosArguments, facts: Callable[[], Facts]) -> SeveralProcesses:
    """The processes of a launch of several; see `processes_of`."""
    if (meeting := present()) is not None:  # before any group is formed: they may differ in which
        meeting.agree("the trainer's creation", facts(), args.ddp_timeout_delta)
    timeout = timedelta(seconds=args.ddp_timeout)
    # accelerate says "cpu:0" for every process; to that, torch would copy every tensor that is on "cpu".
    device = torch.device("cpu") if args.device.type == "cpu" else args.device
    return SeveralProcesses(
        ProcessGrid(args.process_index, args.world_size, args.data_parallel_replicas, device, timeout)
    )


class SeveralProcesses(Processes):
    """See `Processes`; created by all processes at the same point.

    Args:
        grid: which process is which device of which replica.
    """

    _relay: Relay
    _specs: Sequence[BoundarySpec]
    _placement: Sequence[int]
    _accelerator: ReplicaAccelerator

    def __init__(self, grid: ProcessGrid):
        own_device = OwnDevice(grid.device_index, grid.device)
        super().__init__(grid.rank, grid.world_size, grid.replica, grid.replicas, grid.device_index, own_device)
        self._grid = grid
        self._group = grid.standing_group("world", "control")
        self._row = grid.standing_group("row", "set-up")
        self._phase: str | None = None
        self._engine: Engine | None = None
        self._waits_for: tuple[str | None, int | None] = None, None
        self._watch = Watch(grid, self._group, self._doing)
        self._same_batches = SameBatches(grid, self._group, self._watch.check)
        leave_at_exit()

    @property
    def rng_file(self) -> str:
        """See `Processes`."""
        return f"rng_state_{self.rank}.pth"

    @property
    def share_of_host(self) -> tuple[int, int]:
        """See `Processes`; alone, where the launcher does not say."""
        rank, count = os.environ.get("LOCAL_RANK", ""), os.environ.get("LOCAL_WORLD_SIZE", "")
        return (int(rank), int(count)) if rank.isdecimal() and count.isdecimal() and int(rank) < int(count) else (0, 1)

    # ---- what they agree on, and whether all are well ----

    def agree(self, where: str, facts: Callable[[], Facts], timeout: timedelta) -> None:
        """See `Processes`."""
        if (meeting := present()) is not None:
            meeting.agree(where, facts(), timeout, self.check_others)

    def check_batches(self, batches: Sequence[Any], where: str) -> None:
        """See `Processes`."""
        self._same_batches.check(batches, where)

    def check_others(self) -> None:
        """See `Processes`."""
        self._watch.check()

    @contextmanager
    def guard(self, phase: str) -> Iterator[None]:
        """See `Processes`."""
        before, self._phase = self._phase, phase
        try:
            with self._watch.guard():
                yield
        finally:
            self._phase = before

    def _doing(self) -> tuple[str, int | None]:
        engine = self._engine
        if self._phase != "training" or engine is None or engine.closed:
            return self._phase or "between training and evaluation", None
        what, peer = self._waits_for
        if what is not None:
            return f"waiting for {what}", peer
        instruction = engine.instruction
        return ("waiting for its next micro-batch" if instruction is None else f"at {instruction}"), None

    def _wait_for(self, what: str | None, peer: int | None) -> None:
        self._waits_for = what, peer

    # ---- what they tell each other ----

    def barrier(self) -> None:
        """See `Processes`."""
        dist.barrier(self._group)

    def gather(self, value: T) -> list[T]:
        """See `Processes`."""
        return shared_files.gather_objects(self._grid, self._group, value)

    def broadcast(self, value: T) -> T:
        """See `Processes`."""
        return self._from(0, value)

    def from_last_stage(self, value: T) -> T:
        """See `Processes`."""
        return self._from(self._rank_of_last_stage, value)

    def last_stage_to_main(self, value: T) -> T:
        """See `Processes`."""
        source = self._rank_of_last_stage
        message = [value]
        if source != 0 and self.rank == source:
            dist.send_object_list(message, 0, group=self._group)
        elif source != 0 and self.rank == 0:
            dist.recv_object_list(message, source, group=self._group)
        return message[0]

    def sum(self, value: float) -> float:
        """See `Processes`; while this process waits for another one it hears of that one's failure."""
        return summed(value, self._group, self.check_others)

    def gather_files(self, directory: Path, files: Iterable[str], hashes: FileHashes | None = None) -> None:
        """See `Processes`."""
        shared_files.gather_files(directory, files, self._grid, self._group, hashes)

    def gather_timeline(self, timeline: Timeline) -> Timeline:
        """See `Processes`."""
        events = record_of_all(self._grid, self._group, timeline.events)
        gathered = Timeline(timeline.num_devices, timeline.device_names)
        for event in (e for rank in self._grid.row(0) for e in events[rank]):
            gathered.record(event)
        return gathered

    def _from(self, source: int, value: T) -> T:
        message = [value]
        dist.broadcast_object_list(message, source, group=self._group)
        return message[0]

    @property
    def _rank_of_last_stage(self) -> int:
        return self._grid.rank_of(self._placement[-1], 0)

    # ---- stages, batches and engine ----

    def connect(self, partition: Partition, autocast_dtype: torch.dtype | None) -> Relay:
        """See `Processes`."""
        self._placement = partition.plan.placement
        self._specs = boundary_specs(partition, self._grid, self._row, autocast_dtype)
        self._relay = Relay(partition, self._grid, self._specs)
        return self._relay

    def make_engine(
        self,
        partition: Partition,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        settings: EngineSettings,
        timeline: Timeline | None,
    ) -> Engine:
        """See `Processes`."""
        specs = with_gradients(self._specs, partition)
        self._waits_for = None, None
        parts = parts_of_process(
            self._grid, partition.plan, settings.micro_batches, specs, self.check_others, self._wait_for
        )
        self._engine = Engine(partition, optimizer, loss_fn, settings, timeline, parts)
        return self._engine

    def share_batches(self, accelerator: Accelerator) -> ReplicaAccelerator:
        """See `Processes`."""
        self._accelerator = ReplicaAccelerator.over(accelerator, self._grid, self.check_others)
        return self._accelerator

    def evaluation_batches(self, loader: Any, scope: Callable[[], AbstractContextManager[None]]) -> AheadLoader:
        """See `Processes`; batches are compared, and the first stage runs some of them ahead."""
        compared = self._same_batches.of(loader, "evaluation")
        return AheadLoader(compared, self._relay, self._accelerator, scope)

    @property
    def rows_left(self) -> int | None:
        """See `Processes`."""
        return self._accelerator.rows_left
