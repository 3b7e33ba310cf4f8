"""Channels: tensors between the stages of one replica, from process to process, without anybody waiting to send.

A *channel* is ("hidden" | "gradient", receiving stage); its messages arrive in the order in which they were sent. A
receive is posted into fresh memory before the message is needed: autograd may have saved an earlier buffer, and a write
from outside would not bump its version counter.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ..partition import Boundary
from .grid import ProcessGrid
from .groups import POOL, Lease

DIRECTIONS = ("hidden", "gradient")
_ABANDONED: list[Any] = []
_TAGS = itertools.count(1)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor of a boundary, for every micro-batch.

    Args:
        sizes: of every dimension, a number or names of sizes of the batch whose product it is: "batch", "time", "decoder".
        dtype: of its elements.
        trained: whether its gradient is sent back.
    """

    sizes: tuple[int | tuple[str, ...], ...]
    dtype: torch.dtype
    trained: bool = True

    def shape(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        """Its shape for a micro-batch."""
        known = sizes_of(batch)
        return tuple(s if isinstance(s, int) else math.prod(known[name] for name in s) for s in self.sizes)


@dataclass(frozen=True)
class BoundarySpec:
    """What a stage puts out, by name, in the order in which it is sent."""

    tensors: Mapping[str, TensorSpec]

    def __len__(self) -> int:
        return len(self.tensors)

    def shapes(self, batch: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes for a micro-batch."""
        return {name: (spec.shape(batch), spec.dtype) for name, spec in self.tensors.items()}

    def trained(self, name: str) -> bool:
        """Whether a gradient is sent back for the tensor of this name."""
        return self.tensors[name].trained


def sizes_of(batch: Mapping[str, Any]) -> dict[str, int]:
    """The sizes on which shapes of a micro-batch's tensors depend."""
    first = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    sizes = {"batch": first.shape[0], "time": first.shape[1]}
    for key in ("decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if batch.get(key) is not None and batch[key].dim() > 1:
            return {**sizes, "decoder": batch[key].shape[1]}
    return sizes


def _begun(message: dist.Work | None) -> dist.Work:
    """A message that is on its way; torch gives None to processes outside of the group only, and a channel's ends are in it."""
    assert message is not None
    return message


class PostedReceive:
    """A receive that was posted: `wait()` gives the tensor."""

    def __init__(self, work: dist.Work, tensor: torch.Tensor):
        self._work = work
        self._tensor = tensor

    def abandon(self) -> None:
        """To be called instead of `wait()` when nobody will send any more."""
        _ABANDONED.append(self)

    def wait(self) -> torch.Tensor:
        """The tensor, once it is there (on an accelerator: once the current stream may use it)."""
        self._work.wait()
        return self._tensor


class PostedReceives:
    """The receives of a boundary's tensors."""

    def __init__(self, tensors: Mapping[str, PostedReceive]):
        self._tensors = tensors

    def abandon(self) -> None:
        """To be called instead of `wait()` when nobody will send any more."""
        for posted in self._tensors.values():
            posted.abandon()

    def wait(self) -> Boundary:
        """The tensors, once they are there."""
        return {name: posted.wait() for name, posted in self._tensors.items()}


class Channels:
    """The channels of this process; created by all processes at the same point.

    Args:
        grid: the processes.
        placement: device index of every stage.
        tensors: how many a boundary has at most.
    """

    def __init__(self, grid: ProcessGrid, placement: Sequence[int], tensors: int = 1):
        self._grid = grid
        self._placement = placement
        self._tensors = tensors
        self._sending: defaultdict[tuple[str, int], deque[tuple[dist.Work, torch.Tensor]]] = defaultdict(deque)
        self._groups: dict[tuple[str, int], tuple[dist.ProcessGroup, int]] = {}
        self._leases: list[Lease] = []
        channels = [
            (direction, stage)
            for direction in DIRECTIONS
            for stage in range(len(placement))
            if 0 <= self.source(direction, stage) < len(placement) and not self.is_local(direction, stage)
        ]
        if grid.tensor_backend == "gloo":
            # Tags tell the channels apart; nobody gets what was left behind by others that have failed.
            group = grid.standing_group("world", "channels")
            self._groups = {channel: (group, next(_TAGS)) for channel in channels}
            return
        # NCCL knows no tags and runs what a communicator is given one after another: a receive that waits would hold up a
        # send to the same process. So every channel has a communicator, and with it a stream, of its own.
        for replica in range(grid.replicas):
            for direction, stage in channels:
                ends = {
                    grid.rank_of(placement[stage], replica),
                    grid.rank_of(placement[self.source(direction, stage)], replica),
                }
                members = sorted(ends)
                make = partial(dist.new_group, members, timeout=grid.timeout, backend=grid.tensor_backend)
                lease = POOL.lease((*members, grid.timeout, grid.tensor_backend), make)
                self._leases.append(lease)
                if grid.rank in ends:
                    self._groups[direction, stage] = lease.group, 0
                    self._connect(direction, stage)

    def _connect(self, direction: str, stage: int) -> None:
        """Sends one number over a channel.

        At the first message of a communicator NCCL makes both threads wait for each other. Here all processes go through
        the channels in one order; in the middle of a run, one could wait in one channel and its neighbour in another.
        """
        number = torch.zeros(1, device=self._grid.device)
        group, tag = self._groups[direction, stage]
        if self._grid.rank_of(self._placement[stage]) == self._grid.rank:
            _begun(dist.irecv(number, self.peer(direction, stage), group=group, tag=tag)).wait()
        else:
            _begun(dist.isend(number, self._grid.rank_of(self._placement[stage]), group=group, tag=tag)).wait()

    @property
    def posts_early(self) -> bool:
        """Whether a receive is posted as soon as it is known of, so that messages come while the worker computes.

        NCCL's receives are kernels, which would sit on the device until the message comes, and age in its watchdog; there,
        a receive is posted when it is needed, and messages come as soon as their senders' streams are there.
        """
        return self._grid.tensor_backend == "gloo"

    @property
    def max_sending(self) -> int:
        """How many messages of a channel may be on their way, and keep their memory, before the oldest is waited for.

        gloo tells of a message only to those who wait for it that it has been received. No stage is more than K ticks
        ahead of its neighbour, so a message that is older than the K + 2 newest ones has been received: the wait ends
        at once, and nobody waits to send.
        """
        return (len(self._placement) + 2) * self._tensors

    @staticmethod
    def source(direction: str, stage: int) -> int:
        """The stage that sends to this one."""
        return stage - 1 if direction == "hidden" else stage + 1

    def is_local(self, direction: str, stage: int) -> bool:
        """Whether both ends are stages of one device."""
        return self._placement[stage] == self._placement[self.source(direction, stage)]

    def peer(self, direction: str, stage: int) -> int:
        """Rank of the process that sends to this stage."""
        return self._grid.rank_of(self._placement[self.source(direction, stage)])

    def send(self, direction: str, stage: int, tensor: torch.Tensor) -> None:
        """Starts to send a tensor to a stage of another process; it must not be written to any more."""
        sending = self._sending[direction, stage]
        while sending and (sending[0][0].is_completed() or len(sending) > self.max_sending):
            sending.popleft()[0].wait()
        group, tag = self._groups[direction, stage]
        tensor = tensor.contiguous()
        target = self._grid.rank_of(self._placement[stage])
        sending.append((_begun(dist.isend(tensor, target, group=group, tag=tag)), tensor))

    def send_all(self, direction: str, stage: int, tensors: Boundary) -> None:
        """Starts to send a boundary's tensors, in their order."""
        for tensor in tensors.values():
            self.send(direction, stage, tensor)

    def post_all(self, direction: str, stage: int, shapes: Mapping[str, Any]) -> PostedReceives:
        """Starts to receive a boundary's tensors, of these shapes and dtypes."""
        return PostedReceives({name: self.post(direction, stage, *shape) for name, shape in shapes.items()})

    def post(self, direction: str, stage: int, shape: Sequence[int], dtype: torch.dtype) -> PostedReceive:
        """Starts to receive the next tensor of a channel."""
        group, tag = self._groups[direction, stage]
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._grid.device)
        return PostedReceive(_begun(dist.irecv(tensor, self.peer(direction, stage), group=group, tag=tag)), tensor)

    def flush(self) -> None:
        """Waits until everything that was sent has been received."""
        for sending in self._sending.values():
            while sending:
                sending.popleft()[0].wait()
        if self._grid.device.type != "cpu":  # there, only the stream has waited
            torch.get_device_module(self._grid.device).current_stream(self._grid.device).synchronize()

    def close(self, drained: bool = False) -> None:
        """Lets go of the groups.

        Messages that are still on their way, after a failure, stay so until the process ends: gloo would abort it if
        they were destroyed.

        Args:
            drained: whether all processes have received all that was sent to them.
        """
        _ABANDONED.extend(message for sending in self._sending.values() for message in sending)
        self._sending.clear()
        for lease in self._leases:
            lease.end(drained)
        self._leases.clear()
        self._groups.clear()
