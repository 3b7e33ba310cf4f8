"""ProcessTransport: what a worker needs to reach the stages of other processes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..engine.transport import Aborted
from ..errors import ConnectionLostError
from ..partition import Boundary
from .channels import DIRECTIONS, BoundarySpec, Channels, PostedReceives
from .grid import ProcessGrid


@dataclass(frozen=True)
class Expected:
    """What will be received, {name: (shape, dtype)}, where that is posted only when it is needed."""

    shapes: dict[str, Any]


class ProcessTransport:
    """Hands tensors from stage to stage, over the channels or, between stages of one device, by hand.

    No order of sends and receives can deadlock: nobody waits to send, every channel is in tick order on both of its
    ends, and whether the programs wait for each other in a circle was found out by simulation when they were chosen.

    Args:
        grid: the processes; all of them create their transport at the same point.
        placement: device index of every stage.
        specs: what each stage but the last puts out.
        waiting: told (what, rank of the peer) before a wait and (None, None) after it; for whoever watches over the run.
    """

    def __init__(
        self,
        grid: ProcessGrid,
        placement: Sequence[int],
        specs: Sequence[BoundarySpec],
        waiting: Callable[[str | None, int | None], None] = lambda what, peer: None,
    ):
        self.aborted = threading.Event()
        self._grid = grid
        self._specs = specs
        self._waiting = waiting
        self._channels = Channels(grid, placement, max(map(len, specs), default=1))
        self._lease = grid.lease_group("row")
        self._row = self._lease.group
        self._num_stages = len(placement)
        # Receives that were posted, or what a neighbour on the same device left here: (tick, tensor or PostedReceive).
        self._arriving: dict[tuple[str, int], deque[tuple[int, Any]]] = {
            (direction, stage): deque() for direction in DIRECTIONS for stage in range(len(placement))
        }

    def expect_hidden(self, stage: int, tick: int, batch: Mapping[str, Any]) -> None:
        """Posts the receive of a hidden state, or takes note of it."""
        if not self._channels.is_local("hidden", stage):
            self._post("hidden", stage, tick, self._specs[stage - 1].shapes(batch))

    def expect_gradient(self, stage: int, tick: int, output: Boundary) -> None:
        """Posts the receive of an output's gradients, or takes note of it."""
        if not self._channels.is_local("gradient", stage):
            spec = self._specs[stage]
            self._post("gradient", stage, tick, {n: (t.shape, t.dtype) for n, t in output.items() if spec.trained(n)})

    def _post(self, direction: str, stage: int, tick: int, shapes: Mapping[str, Any]) -> None:
        expected: Any = Expected(dict(shapes))
        if self._channels.posts_early:
            with self._talking(f"{direction} of tick {tick} for stage {stage}", self._channels.peer(direction, stage)):
                expected = self._channels.post_all(direction, stage, shapes)
        self._arriving[direction, stage].append((tick, expected))

    def send(self, direction: str, stage: int, tick: int, tensors: Boundary | None) -> None:
        """Sends `direction` of a tick to a stage; never waits."""
        if self._channels.is_local(direction, stage):
            self._arriving[direction, stage].append((tick, tensors))
            return
        assert tensors is not None  # only before the first stage there is nothing
        with self._talking(f"{direction} of tick {tick} to stage {stage}", None):
            self._channels.send_all(direction, stage, tensors)

    def receive(self, direction: str, stage: int, tick: int) -> Boundary | None:
        """Waits for what was sent to this stage for this tick.

        Raises:
            ConnectionLostError: the process that should send it is gone.
            Aborted: the run was stopped.
        """
        if self.aborted.is_set():
            raise Aborted
        expected, item = self._arriving[direction, stage].popleft()
        if expected != tick:
            raise RuntimeError(f"stage {stage} expected the {direction} of tick {tick} but got tick {expected}")
        if not isinstance(item, (PostedReceives, Expected)):
            return item
        with self._talking(f"{direction} of tick {tick} for stage {stage}", self._channels.peer(direction, stage)):
            if isinstance(item, Expected):
                item = self._channels.post_all(direction, stage, item.shapes)
            return item.wait()

    def rendezvous(self) -> None:
        """Waits until all devices of this replica are here."""
        with self._talking("all devices of the replica", None):
            dist.barrier(group=self._row)

    def share(self, update: int, values: dict[int, Any]) -> dict[int, Any]:
        """Puts together the norms of all stages of this replica: {stage: scalar tensor, or None}."""
        table = torch.zeros(2, self._num_stages)
        own = [value for value in values.values() if value is not None]
        dtype = own[0].dtype if own else torch.float32
        for stage, value in values.items():
            if value is not None:
                table[0, stage], table[1, stage] = 1.0, value.float().cpu()
        with self._talking(f"the gradient norms of update {update}", None):
            dist.all_reduce(table, group=self._row)  # exact: all other terms are zero
        return {k: table[1, k].to(dtype) if table[0, k] else None for k in range(self._num_stages)}

    def share_at_rest(self, update: int, values: dict[int, Any]) -> dict[int, Any]:
        """As `share`; a process has one worker, in whose place its main thread does it."""
        return self.share(update, values)

    def abort(self) -> None:
        """Stops this process's worker at its next instruction; the other processes find out by themselves."""
        self.aborted.set()

    def flush(self) -> None:
        """Waits until everything that was sent has been received."""
        with self._talking("others to receive", None):
            self._channels.flush()

    def close(self, drained: bool) -> None:
        """See `Transport`."""
        for items in self._arriving.values():
            for _, item in items:
                if isinstance(item, PostedReceives):
                    item.abandon()
        self._channels.close(drained)
        self._lease.end(drained)
        self._arriving.clear()

    def _talking(self, what: str, peer: int | None) -> _Talking:
        return _Talking(self, what, peer)


class _Talking:
    """Says what is being waited for, and turns a lost connection into a named error."""

    def __init__(self, transport: ProcessTransport, what: str, peer: int | None):
        self._transport, self._what, self._peer = transport, what, peer

    def __enter__(self) -> None:
        self._transport._waiting(self._what, self._peer)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self._transport._waiting(None, None)
        if isinstance(error, RuntimeError):
            if self._transport.aborted.is_set():
                raise Aborted from error
            raise ConnectionLostError(self._what, self._peer, error) from error
