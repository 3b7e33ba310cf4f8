"""EngineParts: what differs among engines: which devices are theirs, how they reach the others, and how they hear of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..partition import StagePlan, torch_device
from .accounts import Accounts
from .averaging import ReplicaMean
from .device_queue import DeviceQueue, has_queues, queue_of
from .transport import InProcessTransport, Transport


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class EngineParts:
    """What an engine works with.

    Args:
        queues: {index in the plan: queue of that device} of the devices that this process runs.
        transport: to and from all stages.
        accounts: hears of losses and steps of the stages that are here, and knows those of all.
        run_ahead: micro-batches that may wait in front of the first stage of this process.
        replica_mean: averages gradients over data-parallel replicas; None for a single replica.
        check_others: called every second of a wait; raises if another process is known to have failed.
        close_timeout: seconds in which workers have to end when the engine is closed.
    """

    queues: Mapping[int, DeviceQueue]
    transport: Transport
    accounts: Accounts
    run_ahead: int = 1
    replica_mean: ReplicaMean | None = None
    check_others: Callable[[], None] = _nothing
    close_timeout: float = 10.0


def parts_of_threads(plan: StagePlan) -> EngineParts:
    """For an engine that runs all devices of a plan, each in a thread."""
    queues = {index: queue_of(torch_device(name)) for index, name in enumerate(plan.devices)}
    crosses_queues = any(has_queues(each.device.type) for each in queues.values())
    by_stage = [queues[index] for index in plan.placement] if crosses_queues else None
    transport = InProcessTransport(plan.num_stages, len(queues), by_stage)
    return EngineParts(queues, transport, Accounts(plan.num_stages))
