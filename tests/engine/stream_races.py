"""A double of an accelerator's library that finds races: what one stream reads must have been waited for by that stream.

Computation happens at once, on the CPU, so that numbers are right in any case. Beside it every stream has a clock: how far it
has seen every other stream come. An operation of a stream makes its own time go on; an event keeps the stream's clock; waiting for
an event takes that clock over. An operation that reads what another stream has written, without having seen that stream come
so far, is a race: on a device it might read what was there before. So is writing what others may still read, and so is using
what another stream has allocated without telling the allocator.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

Clock = Counter  # {stream: how far it has come}


class Stream:
    """A queue of a device that does not exist."""

    def __init__(self, name: str, device: str):
        self.name, self.device = name, device
        self.clock: Clock = Counter()

    def __repr__(self) -> str:
        return self.name


class Event:
    """A point in a stream's time."""

    def __init__(self, clock: Clock, done: Clock):
        self.clock, self._done = Clock(clock), done

    def query(self) -> bool:
        """Whether a thread has waited for this or a later event: a device may be as slow as that."""
        return all(self._done[stream] >= time for stream, time in self.clock.items())

    def synchronize(self) -> None:
        """What has been done by now is before whatever is asked for from now on, in any stream."""
        for stream, time in self.clock.items():
            self._done[stream] = max(self._done[stream], time)

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Memory:
    """Who has written and read a piece of memory, and when."""

    def __init__(self, stream: Stream):
        self.home = stream
        self.written: tuple[Stream, int] | None = None
        self.read: Clock = Counter()
        self.recorded = {stream}


class RacingBackend:
    """See the module's text; has the interface of `device_queue.Backend`.

    Attributes:
        races: sentences, one for each race.
        log: (what, stream, ...) of everything but computation.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self.log: list[tuple[Any, ...]] = []
        self.done: Clock = Counter()
        self._default: dict[Any, Stream] = {}
        self._memory: dict[int, Memory] = {}
        self._here = threading.local()
        self._lock = threading.RLock()

    def __call__(self, kind: str) -> RacingBackend:
        return self

    # ---- the interface ----

    def stream(self, device: Any) -> Stream:
        return Stream(f"stream {len(self.log)} of {device}", device)

    def default_stream(self, device: Any) -> Stream:
        with self._lock:
            return self._default.setdefault(device, Stream(f"default of {device}", device))

    def current_stream(self, device: Any) -> Stream:
        return getattr(self._here, "stream", None) or self.default_stream(device)

    def use(self, stream: Stream) -> None:
        self._here.stream = stream
        _Racing(self).__enter__()  # for the rest of this thread

    @contextmanager
    def using(self, stream: Stream) -> Any:
        before = getattr(self._here, "stream", None), getattr(self._here, "outer", None)
        self._here.stream, self._here.outer = stream, before[0]
        yield
        self._here.stream, self._here.outer = before

    def event(self, stream: Stream, timing: bool = False) -> Event:
        with self._lock:
            self.log.append(("event", stream))
            return Event(self._now(stream), self.done)

    def wait(self, stream: Stream, event: Event) -> None:
        with self._lock:
            self.log.append(("wait", stream))
            for other, time in event.clock.items():
                stream.clock[other] = max(stream.clock[other], time)

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        with self._lock:
            self.log.append(("record", stream))
            if (memory := self._memory.get(_key(tensor))) is not None:
                memory.recorded.add(stream)

    def is_on(self, tensor: torch.Tensor, device: Any) -> bool:
        return True

    def copy(self, tensor: torch.Tensor, device: Any) -> torch.Tensor:
        """As torch: made by the source's stream, after what the target's was asked for; that one waits for it."""
        out, into = getattr(self._here, "outer", None), self._here.stream
        if out is None:  # from the host's memory
            return tensor.clone()
        self.log.append(("copy", out, into))
        self.wait(out, self.event(into))
        with torch._C._DisableTorchDispatch():
            made = tensor.clone()
        self._here.stream = out
        self.check([tensor], [], "a copy")
        self._here.stream = into
        self.wait(into, self.event(out))
        self.note(made, into)
        return made

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.check([tensor], [], "a read")
        return tensor.clone()

    # ---- finding races ----

    @contextmanager
    def observing(self, device: Any) -> Any:
        """Operations of this thread are those of the stream that it uses."""
        with _Racing(self):
            yield

    def _now(self, stream: Stream) -> Clock:
        clock = Clock(stream.clock)
        for other, time in self.done.items():
            clock[other] = max(clock[other], time)
        return clock

    def check(self, read: list[torch.Tensor], written: list[torch.Tensor], what: str) -> None:
        """An operation of the stream in use."""
        stream = self.current_stream("fake")
        with self._lock:
            now = self._now(stream)
            stream.clock[stream] += 1
            for tensor in [*read, *written]:
                memory = self._memory.get(_key(tensor))
                if memory is None:
                    continue
                if memory.written is not None and memory.written[0] is not stream:
                    writer, time = memory.written
                    if now[writer] < time:
                        self.races.append(f"{what} in {stream} of what {writer} may still be writing")
                # Main threads read while workers rest, and these wait for them before they go on.
                if stream not in memory.recorded and stream not in self._default.values():
                    self.races.append(f"{what} in {stream} of memory of {memory.home} that may be given away")
            for tensor in written:
                memory = self._memory.get(_key(tensor))
                late = [s for s, t in (memory.read if memory else {}).items() if s is not stream and now[s] < t]
                if late:
                    self.races.append(f"{what} in {stream} writes what {late[0]} may still read")
            for tensor in read:
                if (memory := self._memory.get(_key(tensor))) is not None:
                    memory.read[stream] = stream.clock[stream]
            for tensor in written:
                self.note(tensor, stream)

    def note(self, tensor: torch.Tensor, stream: Stream) -> None:
        """A stream has written into a tensor's memory, which is new if it was not known."""
        with self._lock:
            key = _key(tensor)
            if key not in self._memory:
                self._memory[key] = Memory(stream)
                weakref.finalize(tensor.untyped_storage(), self._memory.pop, key, None)
            self._memory[key].written = stream, stream.clock[stream]


class _Racing(TorchDispatchMode):
    """Tells a backend of every operation of a thread."""

    def __init__(self, backend: RacingBackend):
        super().__init__()
        self._backend = backend

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        read = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for value in tree_flatten(value)[0]
            if isinstance(value, torch.Tensor)
        ]
        result = func(*args, **kwargs)
        made = [value for value in tree_flatten(result)[0] if isinstance(value, torch.Tensor)]
        if func.is_view:
            return result
        old = {_key(tensor) for tensor in read}
        self._backend.check(read, written, str(func))
        for tensor in made:
            if _key(tensor) not in old:
                self._backend.note(tensor, self._backend.current_stream("fake"))
        return result


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
