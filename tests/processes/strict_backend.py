"""A backend over gloo that is as strict as NCCL: what deadlocks with NCCL has to fail here, too.

- The first message between two processes of a communicator is a meeting: both threads wait until the other one has come to the
  same communicator.
- A communicator executes what it is given one after another, and a message holds it up until it has been received.
- Tags are ignored.
"""

from __future__ import annotations

import queue
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NAME = "strict"
DEADLOCK = 20.0
"""Seconds after which a meeting is taken for a deadlock."""


class StrictWork(dist._Work):
    """What a communicator will do."""

    def __init__(self) -> None:
        super().__init__()
        self.done = threading.Event()
        self.error: BaseException | None = None

    def is_completed(self) -> bool:
        return self.done.is_set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self.done.wait(60):
            raise RuntimeError("the strict backend waited for a minute")
        if self.error is not None:
            raise RuntimeError(str(self.error))
        return True


class StrictGroup(dist.ProcessGroup):
    """A communicator.

    Args:
        store: where its processes meet.
        rank: of this process among them.
        size: how many they are.
        timeout: of its messages.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self._store, self._own = store, rank
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)
        self._met: set[int] = set()
        self._todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def getBackendName(self) -> str:
        return NAME

    def send(self, tensors: list[torch.Tensor], to: int, tag: int = 0) -> StrictWork:
        def message() -> None:
            self._gloo.send(tensors, to, 0).wait()
            self._gloo.recv([torch.zeros(1)], to, 1).wait()  # it has been received

        return self._given(to, message)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> StrictWork:
        def message() -> None:
            self._gloo.recv(tensors, source, 0).wait()
            self._gloo.send([torch.zeros(1)], source, 1).wait()

        return self._given(source, message)

    def _given(self, peer: int, message: Any) -> StrictWork:
        if peer not in self._met:
            self._meet(peer)
        work = StrictWork()
        self._todo.put((work, message))
        return work

    def _meet(self, peer: int) -> None:
        self._store.set(f"{self._own} is here for {peer}", "")
        limit = time.monotonic() + DEADLOCK
        while not self._store.check([f"{peer} is here for {self._own}"]):
            if time.monotonic() > limit:
                raise RuntimeError(f"DEADLOCK: {self._own} waits for {peer} at the first message of a communicator")
            time.sleep(0.002)
        self._met.add(peer)

    def _work(self) -> None:
        while True:
            work, message = self._todo.get()
            try:
                message()
            except BaseException as error:
                work.error = error
            work.done.set()


def _made(store: Any, rank: int, size: int, timeout: timedelta) -> StrictGroup:
    return StrictGroup(store, rank, size, timeout)


def use_strict_backend() -> None:
    """From now on the tensors of this process's stages go over it."""
    from hf_ouroboros.processes.grid import ProcessGrid

    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, _made, devices=["cpu"])
    ProcessGrid.tensor_backend = NAME
