"""Device queues: in which order an accelerator does what a worker asks for, without the worker ever waiting for it.

A worker's thread only *asks*: the device works through a queue (CUDA calls it a stream) and is some way behind. Whatever one
queue computes and another one reads is bound to an event of the first:

    worker of stage 0   |F0 t4|B0 t1|F0 t5| ...      its own queue
                              \\ event                 copied in a queue beside, while both workers compute
    worker of stage 1         \\|F1 t4|B1 t2| ...    its own queue waits for the copy, the thread does not

Three rules keep memory right. A tensor that another queue reads is *recorded* there, so that its memory is not given away
before that queue has passed. What the main thread has written while the workers rested is waited for when they go on. And a
thread is at most `AHEAD` forwards ahead of its device, or memory that waits for other queues would pile up.

On the CPU everything is done when the call returns, and a queue does nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch

from ..partition import Boundary

AHEAD = 3
"""Forwards that a worker may have asked for and its device not done."""

Moment = float | torch.Event
"""A point of a queue's time: seconds on a CPU, elsewhere an event."""


class Reading:
    """A number on its way from a device to whoever wants to read it.

    Args:
        copy: the scalar in the host's memory.
        event: passed when it is there.
    """

    def __init__(self, copy: torch.Tensor, event: torch.Event):
        self._copy, self._event = copy, event

    @property
    def is_there(self) -> bool:
        """Whether nobody has to wait for it."""
        return self._event.query()

    def __float__(self) -> float:
        """The number; waits for it."""
        self._event.synchronize()
        return float(self._copy)


@dataclass(frozen=True)
class Parcel:
    """Tensors of a boundary on their way to another queue.

    Args:
        tensors: on the device where they go.
        event: passed when they are there; None if they are.
    """

    tensors: Boundary | None
    event: torch.Event | None = None


class DeviceQueue:
    """The queue of a CPU worker: everything is done at once.

    Args:
        device: where the worker computes.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def begin(self) -> None:
        """Makes the calling thread the worker's."""

    def go_on(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        """After a rest, in which others may have written: waits for them, in the queue.

        Args:
            tensors: what others may have made meanwhile and this worker will use and let go.
        """

    def come_to_rest(self) -> None:
        """Waits, in the thread, until the device has done everything."""

    def keep_pace(self) -> None:
        """Before a forward: waits, in the thread, while the device is more than `AHEAD` forwards behind."""

    def accept(self, batch: Mapping[str, Any], events: Mapping[torch.device, torch.Event]) -> None:
        """A micro-batch that the main thread has handed over is going to be used.

        Args:
            batch: the micro-batch.
            events: where its tensors were made, by device; see `handed_over`.
        """

    def send(self, tensors: Boundary | None, receiver: DeviceQueue) -> Parcel:
        """Starts to bring tensors that this queue computes to another one."""
        return Parcel(tensors)

    def receive(self, parcel: Parcel) -> Boundary | None:
        """The tensors of a parcel, for use by this queue."""
        return parcel.tensors

    def reading(self, tensor: torch.Tensor) -> SupportsFloat:
        """Starts to bring a scalar to where it can be read: by `float`, which waits for it where it has to be."""
        return tensor

    def put_away(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors that are not needed for a while, where they take none of the device's memory."""
        return dict(tensors)

    def take_out(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors that were put away, on the device."""
        return dict(tensors)

    def moment(self) -> Moment:
        """Now, in the queue."""
        return time.perf_counter()

    def has_passed(self, moment: Moment) -> bool:
        """Whether a moment is over."""
        return True

    def seconds(self, moment: Moment) -> float:
        """A moment that is over, in seconds of `time.perf_counter`."""
        assert isinstance(moment, float)
        return moment


class AcceleratorQueue(DeviceQueue):
    """The queue of a worker on an accelerator, one of its own, so that the main thread's small reads wait for no worker.

    Args:
        device: where the worker computes; with an index.
        backend: the calls of the device's library.
    """

    def __init__(self, device: torch.device, backend: Backend):
        super().__init__(device)
        self._backend = backend
        self._compute = backend.stream(device)
        self._beside: dict[tuple[int, torch.device], torch.Stream] = {}  # (id of the peer, device): streams of copies
        self._forwards: deque[torch.Event] = deque()
        self._origin: tuple[torch.Event, float] | None = None

    def begin(self) -> None:
        """See `DeviceQueue`."""
        self._backend.use(self._compute)
        self.go_on()
        event = self._backend.event(self._compute, timing=True)
        event.synchronize()
        self._origin = event, time.perf_counter()

    def go_on(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        """See `DeviceQueue`."""
        self._backend.wait(self._compute, self._backend.event(self._backend.default_stream(self.device)))
        for tensor in tensors:
            if self._backend.is_on(tensor, self.device):
                self._backend.record(tensor, self._compute)

    def come_to_rest(self) -> None:
        """See `DeviceQueue`."""
        self._backend.event(self._compute).synchronize()
        self._forwards.clear()

    def keep_pace(self) -> None:
        """See `DeviceQueue`."""
        while len(self._forwards) >= AHEAD:
            self._forwards.popleft().synchronize()
        self._forwards.append(self._backend.event(self._compute))

    def accept(self, batch: Mapping[str, Any], events: Mapping[torch.device, torch.Event]) -> None:
        """See `DeviceQueue`."""
        if self.device in events:
            self._backend.wait(self._compute, events[self.device])
            for value in batch.values():
                if torch.is_tensor(value) and self._backend.is_on(value, self.device):
                    self._backend.record(value, self._compute)

    def send(self, tensors: Boundary | None, receiver: DeviceQueue) -> Parcel:
        """See `DeviceQueue`; a copy to another device is made beside both computations."""
        if receiver is self or not tensors:
            return Parcel(tensors)
        backend, computed = self._backend, self._backend.event(self._compute)
        if receiver.device == self.device:
            return Parcel(tensors, computed)
        out, into = self._copies(receiver, self.device), self._copies(receiver, receiver.device)
        backend.wait(out, computed)
        copies = {}
        with backend.using(out), backend.using(into):
            for name, tensor in tensors.items():
                backend.record(tensor, out)
                copies[name] = backend.copy(tensor, receiver.device)
        return Parcel(copies, backend.event(into))

    def receive(self, parcel: Parcel) -> Boundary | None:
        """See `DeviceQueue`."""
        if parcel.event is not None:
            self._backend.wait(self._compute, parcel.event)
            for tensor in (parcel.tensors or {}).values():
                self._backend.record(tensor, self._compute)
        return parcel.tensors

    def reading(self, tensor: torch.Tensor) -> Reading:
        """See `DeviceQueue`."""
        return Reading(self._backend.to_host(tensor), self._backend.event(self._compute))

    def put_away(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `DeviceQueue`; the copies are there when the queue has come to rest."""
        return {name: self._backend.to_host(tensor) for name, tensor in tensors.items()}

    def take_out(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `DeviceQueue`."""
        return {name: self._backend.copy(tensor, self.device) for name, tensor in tensors.items()}

    def moment(self) -> Moment:
        """See `DeviceQueue`."""
        return self._backend.event(self._compute, timing=True)

    def has_passed(self, moment: Moment) -> bool:
        """See `DeviceQueue`."""
        assert not isinstance(moment, float)
        return moment.query()

    def seconds(self, moment: Moment) -> float:
        """See `DeviceQueue`."""
        assert self._origin is not None and not isinstance(moment, float)
        event, seconds = self._origin
        return seconds + event.elapsed_time(moment) / 1000

    def _copies(self, receiver: DeviceQueue, device: torch.device) -> torch.Stream:
        key = id(receiver), device
        if key not in self._beside:
            self._beside[key] = self._backend.stream(device)
        return self._beside[key]


class Backend:
    """What queues ask of a device's library, so that tests can listen to it.

    Args:
        kind: of device, e.g. "cuda"; any that torch has streams for.
    """

    def __init__(self, kind: str):
        self._module = torch.get_device_module(kind)

    def stream(self, device: torch.device) -> torch.Stream:
        """A new stream of a device."""
        stream: torch.Stream = self._module.Stream(device)
        return stream

    def default_stream(self, device: torch.device) -> torch.Stream:
        """The stream of those who ask for none."""
        stream: torch.Stream = self._module.default_stream(device)
        return stream

    def current_stream(self, device: torch.device) -> torch.Stream:
        """The stream that this thread uses on a device."""
        stream: torch.Stream = self._module.current_stream(device)
        return stream

    def use(self, stream: torch.Stream) -> None:
        """Lets this thread use a stream, and its device, from now on."""
        self._module.set_device(stream.device)
        self._module.set_stream(stream)

    def using(self, stream: torch.Stream) -> AbstractContextManager[None]:
        """Lets this thread use a stream on the stream's device for a while."""
        use: AbstractContextManager[None] = self._module.stream(stream)
        return use

    def event(self, stream: torch.Stream, timing: bool = False) -> torch.Event:
        """An event that passes when a stream has done what it was asked for so far."""
        event: torch.Event = self._module.Event(enable_timing=timing)
        event.record(stream)
        return event

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        """Lets a stream, not the thread, wait for an event."""
        stream.wait_event(event)

    def record(self, tensor: torch.Tensor, stream: torch.Stream) -> None:
        """Keeps a tensor's memory until a stream has done what it was asked for before the tensor was let go."""
        tensor.record_stream(stream)

    def is_on(self, tensor: torch.Tensor, device: torch.device) -> bool:
        """Whether a tensor is on a device."""
        return tensor.device == device

    def copy(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A copy on another device, made by the streams in use."""
        return tensor.to(device, non_blocking=True)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the host's memory, which is there when the stream in use has come so far."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def queue_of(device: torch.device, backend: Callable[[str], Backend] = Backend) -> DeviceQueue:
    """The queue of a worker on a device.

    Args:
        device: where the worker computes.
        backend: makes the calls of the device's library.
    """
    return AcceleratorQueue(device, backend(device.type)) if has_queues(device.type) else DeviceQueue(device)


def has_queues(kind: str) -> bool:
    """Whether devices of a kind work through several queues; others than CPUs then do all in one order anyway."""
    if kind == "cpu":
        return False
    module = torch.get_device_module(kind)
    return all(hasattr(module, name) for name in ("Stream", "Event", "default_stream", "set_stream"))


def handed_over(batch: Mapping[str, Any], to_queues: bool) -> tuple[Mapping[str, Any], dict[torch.device, torch.Event]]:
    """A micro-batch as workers may use it without waiting, to be called in the thread that has made it.

    Args:
        batch: what the script's data loader gives.
        to_queues: whether workers are on accelerators that have queues.

    Returns:
        The micro-batch, in memory from which accelerators can copy while others work, and for each accelerator with a
        tensor of it an event that passes when this thread's work there is done.
    """
    if not to_queues:
        return batch, {}
    batch = {k: v.pin_memory() if torch.is_tensor(v) and v.device.type == "cpu" else v for k, v in batch.items()}
    places = {v.device for v in batch.values() if torch.is_tensor(v) and v.device.type != "cpu"}
    events = {}
    for place in places:
        backend = Backend(place.type)
        events[place] = backend.event(backend.current_stream(place))
    return batch, events
