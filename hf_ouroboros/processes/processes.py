"""Processes: what trainer and hooks ask of the processes of a run, with the plain answers of a run of a single one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..checkpoint.reading import RNG_STATE
from ..engine.core import Engine
from ..partition import OwnDevice, Partition
from .handshake import Facts

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from ..arguments import OuroborosArguments
    from ..checkpoint.hashes import FileHashes
    from ..engine.losses import LossFunction
    from ..engine.settings import EngineSettings
    from ..simulate.timeline import Timeline
    from .relay import Relay

T = TypeVar("T")


class Processes:
    """A run of a single process, which runs all devices. `SeveralProcesses` is a launch in which each is one device.

    All processes make the same calls in the same order; what they tell each other, a single one knows already.

    Attributes:
        rank: this process.
        world_size: how many there are.
        replica: which data-parallel replica this process belongs to.
        replicas: R.
        device_index: which device of its replica this process is; 0 where it is all of them.
        processes_per_replica: how many share a batch.
        own_device: the device of the plan that this process is; None where it is all of them.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        replica: int = 0,
        replicas: int = 1,
        device_index: int = 0,
        own_device: OwnDevice | None = None,
    ):
        self.rank, self.world_size = rank, world_size
        self.replica, self.replicas = replica, replicas
        self.device_index, self.processes_per_replica = device_index, world_size // replicas
        self.own_device = own_device

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.world_size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    @property
    def rng_file(self) -> str:
        """Under which name Trainer saves this process's random numbers."""
        return RNG_STATE

    @property
    def share_of_host(self) -> tuple[int, int]:
        """(index, count) of this process among those of its host, which read the files there together."""
        return 0, 1

    # ---- what they agree on, and whether all are well ----

    def agree(self, where: str, facts: Callable[[], Facts], timeout: timedelta) -> None:
        """Compares what the processes know.

        Args:
            where: the point they have reached.
            facts: makes what this process knows; see `processes.meeting.Meeting.agree`.
            timeout: how long to wait for the others.

        Raises:
            DisagreementError: they differ.
            RankFailedError: another process refused, is gone, or is late.
        """

    def check_batches(self, batches: Sequence[Any], where: str) -> None:
        """Compares the micro-batches of an update; see `processes.same_batches.SameBatches.check`."""

    def check_others(self) -> None:
        """Raises if another process is known to have failed."""

    def guard(self, phase: str) -> AbstractContextManager[None]:
        """Names what is going on to those who watch; the failure of another process becomes a named error here."""
        return nullcontext()

    # ---- what they tell each other ----

    def barrier(self) -> None:
        """Waits for all of them."""

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        return [value]

    def broadcast(self, value: T) -> T:
        """The main process's value."""
        return value

    def from_last_stage(self, value: T) -> T:
        """The value of the process that has the last stage, and with it losses and logits, of the first replica."""
        return value

    def last_stage_to_main(self, value: T) -> T:
        """The same, in the main process only; what the others have given, in them."""
        return value

    def sum(self, value: float) -> float:
        """The sum of all values."""
        return value

    def gather_files(self, directory: Path, files: Iterable[str], hashes: FileHashes | None = None) -> None:
        """Has the files that each process wrote into a directory arrive in the main process's; see `processes.files`."""

    def gather_timeline(self, timeline: Timeline) -> Timeline:
        """What the workers of all devices, of the first replica, have executed."""
        return timeline

    # ---- stages, batches and engine ----

    def connect(self, partition: Partition, autocast_dtype: torch.dtype | None) -> Relay | None:
        """Connects the stages of a model that was just split.

        Args:
            partition: the split model.
            autocast_dtype: dtype of mixed precision; None for none.

        Returns:
            What passes batches of an evaluation from process to process; None where all stages are here.
        """
        return None

    def make_engine(
        self,
        partition: Partition,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        settings: EngineSettings,
        timeline: Timeline | None,
    ) -> Engine:
        """An engine for the stages that are here; arguments as for `Engine`."""
        return Engine(partition, optimizer, loss_fn, settings, timeline)

    def share_batches(self, accelerator: Accelerator) -> Accelerator:
        """Lets Trainer's accelerator give the same batches to all processes of a replica, and others to each replica."""
        return accelerator

    def evaluation_batches(self, loader: Any, scope: Callable[[], AbstractContextManager[None]]) -> Any:
        """A data loader for an evaluation.

        Args:
            loader: Trainer's.
            scope: entered around forwards that are run ahead.
        """
        return loader

    @property
    def rows_left(self) -> int | None:
        """How many rows of an evaluation's last batch, that of all replicas, are not repetitions; None before it."""
        return None


def processes_of(args: OuroborosArguments, facts: Callable[[], Mapping[str, Mapping[str, Any]]]) -> Processes:
    """The processes of a run, once they agree; called where all of them make a trainer.

    Args:
        args: options of the run.
        facts: makes what has to be the same in all of them before anything else is decided.

    Raises:
        DisagreementError, RankFailedError: see `Processes.agree`.
    """
    if args.world_size == 1:
        return Processes()
    from .several import meet  # with everything that only several processes need

    return meet(args, facts)
