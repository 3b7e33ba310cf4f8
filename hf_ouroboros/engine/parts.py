"""EngineParts: what differs among engines: which devices are theirs, how they reach the others, and how they hear of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

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
        devices: {index in the plan: torch device} of the devices that this process runs.
        queues: what these are asked to do goes through; see `device_queue`.
        transport: to and from all stages.
        accounts: hears of losses and steps of the stages that are here, and knows those of all.
        run_ahead: micro-batches that may wait in front of the first stage of this process.
        replica_mean: averages gradients over data-parallel replicas; None for a single replica.
        check_others: called every second of a wait; raises if another process is known to have failed.
        close_timeout: seconds in which workers have to end when the engine is closed.
    """

    devices: Mapping[int, torch.device]
    queues: Mapping[int, DeviceQueue]
    transport: Transport
    accounts: Accounts
    run_ahead: int = 1
    replica_mean: ReplicaMean | None = None
    check_others: Callable[[], None] = _nothing
    close_timeout: float = 10.0


def parts_of_threads(plan: StagePlan) -> EngineParts:
    """For an engine that runs all devices of a plan, each in a thread."""
    devices = {index: torch_device(name) for index, name in enumerate(plan.devices)}
    queues = {index: queue_of(device) for index, device in devices.items()}
    crosses_queues = any(has_queues(device.type) for device in devices.values())
    by_stage = [queues[index] for index in plan.placement] if crosses_queues else None
    transport = InProcessTransport(plan.num_stages, len(queues), by_stage)
    return EngineParts(devices, queues, transport, Accounts(plan.num_stages))
