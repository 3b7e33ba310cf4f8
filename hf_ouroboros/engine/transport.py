"""How tensors travel between stages: what every transport does, and queues between the threads of one process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..partition import Boundary
from .device_queue import DeviceQueue, Parcel

Message = tuple[int, Boundary | Parcel | None]
"""A tick, and what is sent of it."""


class Aborted(Exception):
    """Raised in workers that wait for something that will not come because the run was stopped."""


class Transport(Protocol):
    """What a worker needs to reach the other stages. Messages of a (direction, stage) arrive in tick order."""

    aborted: threading.Event

    def expect_hidden(self, stage: int, tick: int, batch: Mapping[str, Any]) -> None:
        """Told as soon as a tick is known, in tick order: what crosses to this stage will be received."""

    def expect_gradient(self, stage: int, tick: int, output: Boundary) -> None:
        """Told after a stage's forward, in tick order: the gradient of its output will be received."""

    def send(self, direction: str, stage: int, tick: int, tensors: Boundary | None) -> None:
        """Sends `direction` ("hidden" or "gradient") of a tick to a stage."""

    def receive(self, direction: str, stage: int, tick: int) -> Boundary | None:
        """Waits for what was sent to this stage for this tick; raises Aborted if the run was stopped."""

    def rendezvous(self) -> None:
        """Waits until all devices are here."""

    def share(self, update: int, values: dict[int, Any]) -> dict[int, Any]:
        """Puts together what the devices contribute to an update: {stage: value} of all of them."""

    def share_at_rest(self, update: int, values: dict[int, Any]) -> dict[int, Any]:
        """The same, in the main thread of a process while its workers rest, for all of its stages."""

    def flush(self) -> None:
        """Waits until everything that was sent has been received."""

    def abort(self) -> None:
        """Wakes all waiting workers with `Aborted`; may be called from any thread, more than once."""

    def close(self, drained: bool) -> None:
        """Lets go of what connects processes, and of whatever is still on its way.

        Args:
            drained: whether all processes have received all that was sent to them, so that connections can be used again.
        """


class InProcessTransport:
    """Hands tensors from stage to stage in tick order, without copies where the device stays the same.

    Args:
        num_stages: K.
        num_devices: number of workers, for the meetings of all of them.
        queues: of each stage's device; None where all are CPUs.
    """

    def __init__(self, num_stages: int, num_devices: int, queues: Sequence[DeviceQueue] | None = None):
        self._queues = queues
        self._channels: dict[tuple[str, int], queue.SimpleQueue[Message | None]] = {
            (direction, stage): queue.SimpleQueue()
            for direction in ("hidden", "gradient")
            for stage in range(num_stages)
        }
        self._barrier = threading.Barrier(num_devices)
        self._shared: dict[int, dict[int, Any]] = {}
        self.aborted = threading.Event()

    def expect_hidden(self, stage: int, tick: int, batch: Mapping[str, Any]) -> None:
        """Nothing: queues take whatever comes."""

    def expect_gradient(self, stage: int, tick: int, output: Boundary) -> None:
        """Nothing: queues take whatever comes."""

    def send(self, direction: str, stage: int, tick: int, tensors: Boundary | None) -> None:
        """Sends `direction` ("hidden" or "gradient") of a tick to a stage."""
        channel = self._channels[direction, stage]
        if self._queues is None:
            channel.put((tick, tensors))
        else:
            sender = self._queues[stage - 1 if direction == "hidden" else stage + 1]
            channel.put((tick, sender.send(tensors, self._queues[stage])))

    def receive(self, direction: str, stage: int, tick: int) -> Boundary | None:
        """Waits for what was sent to this stage for this tick.

        Raises:
            Aborted: the run was stopped.
        """
        item = self._channels[direction, stage].get()
        if item is None:
            self._channels[direction, stage].put(None)
            raise Aborted
        sent_tick, sent = item
        if sent_tick != tick:
            raise RuntimeError(f"stage {stage} expected the {direction} of tick {tick} but got tick {sent_tick}")
        if isinstance(sent, Parcel):
            assert self._queues is not None
            return self._queues[stage].receive(sent)
        return sent

    def rendezvous(self) -> None:
        """Waits until all devices are here."""
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise Aborted from None

    def share(self, update: int, values: dict[int, Any]) -> dict[int, Any]:
        """Puts together what the devices contribute to an update: {stage: value} of all of them."""
        self._shared.setdefault(update, {}).update(values)
        self.rendezvous()
        self._shared.pop(update - 2, None)  # everybody has read it: all came to this rendezvous since
        return self._shared[update]

    def share_at_rest(self, update: int, values: dict[int, Any]) -> dict[int, Any]:
        """The values themselves: all stages are here."""
        return values

    def flush(self) -> None:
        """Nothing: what was sent is here."""

    def abort(self) -> None:
        """Wakes all waiting workers with `Aborted`; may be called from any thread, more than once."""
        self.aborted.set()
        self._barrier.abort()
        for channel in self._channels.values():
            channel.put(None)

    def close(self, drained: bool) -> None:
        """Nothing: nobody else is connected."""
