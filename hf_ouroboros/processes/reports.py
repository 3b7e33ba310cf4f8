"""Reports: what every process tells all others about an update, some updates later, so that nobody waits.

After the step of update u each process contributes one row about an earlier update: a fingerprint of its micro-batches,
their losses (known where the last stage is) and the gradient norms of its stages. Which rows have been taken in at which
point of the run does not depend on timing: all processes log the same numbers and take the same decisions.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..errors import EngineError
from .awaiting import await_others
from .grid import ProcessGrid


@dataclass(frozen=True)
class UpdateReport:
    """All processes' account of an update.

    Args:
        update: its number.
        ticks: its micro-batches.
        losses: loss of each of them, the mean over replicas.
        norms: gradient norm of each stage before clipping; None where a stage had no gradient.
        stop: whether any process asked for the end of the run.
    """

    update: int
    ticks: Sequence[int]
    losses: Sequence[float]
    norms: Sequence[float | None]
    stop: bool


@dataclass(frozen=True)
class Sent:
    """Rows about an update that are on their way.

    Args:
        issued: updates that were closed when they were sent.
        update: which one they are about.
        ticks: its micro-batches.
        work: of the call that gathers the rows.
        rows: of every process, by rank, once it is complete.
    """

    issued: int
    update: int
    ticks: Sequence[int]
    work: dist.Work
    rows: list[torch.Tensor]


class Reports:
    """Rows on their way; created by all processes at the same point.

    Args:
        grid: the processes.
        placement: device index of every stage.
        check: raises if another process is known to have failed; called while this one waits.
    """

    def __init__(self, grid: ProcessGrid, placement: Sequence[int], check: Callable[[], None] = lambda: None):
        self._grid, self._check = grid, check
        self._placement = placement
        self._lease = grid.lease_group("world")
        self._group = self._lease.group
        self._on_their_way: deque[Sent] = deque()

    def send(
        self,
        issued: int,
        update: int,
        ticks: Sequence[int],
        fingerprint: int,
        losses: Sequence[float],
        norms: Mapping[int, float | None],
        stop: bool = False,
    ) -> None:
        """Contributes this process's row about an update.

        Args:
            issued: number of updates closed so far.
            update: which update it is about.
            ticks: the update's micro-batches.
            fingerprint: of the micro-batches, below 2**32.
            losses: their losses; empty where this process does not have the last stage.
            norms: {stage: gradient norm or None} of this process's stages.
            stop: whether this process asks for the end of the run.
        """
        # fingerprint, stop, a loss per tick, then (is there one?, norm) per stage
        values = [float(fingerprint), float(stop), *(losses or [0.0] * len(ticks))]
        for stage in range(len(self._placement)):
            norm = norms.get(stage)
            values += [0.0, 0.0] if norm is None else [1.0, norm]
        row = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(self._grid.world_size)]
        work = dist.all_gather(rows, row, self._group, async_op=True)
        self._on_their_way.append(Sent(issued, update, ticks, work, rows))

    def take(self, issued_before: float = math.inf, about_before: int = 0) -> list[UpdateReport]:
        """Waits for the rows issued before so many updates were closed, or about one of the first, and puts them together."""
        reports = []
        while self._on_their_way:
            sent = self._on_their_way[0]
            if sent.issued >= issued_before and sent.update >= about_before:
                break
            self._on_their_way.popleft()
            await_others(sent.work, self._check)
            reports.append(self._put_together(sent))
        return reports

    def share(self, losses: Sequence[float]) -> list[float]:
        """Tells everybody losses at once, the mean over replicas; zeros where this process does not have the last stage."""
        row = torch.tensor(losses, dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(self._grid.world_size)]
        await_others(dist.all_gather(rows, row, self._group, async_op=True), self._check)
        last = [rows[rank] for rank in self._grid.column(self._placement[-1])]
        return [sum(float(row[i]) for row in last) / self._grid.replicas for i in range(len(losses))]

    def close(self, drained: bool = False) -> None:
        """Lets go of the group.

        Args:
            drained: whether all processes have taken part in all reports.
        """
        if drained:
            self.take()
        self._lease.end(drained)

    def _put_together(self, sent: Sent) -> UpdateReport:
        grid, ticks, rows, count = self._grid, sent.ticks, sent.rows, len(sent.ticks)
        for replica in range(grid.replicas):
            found = {int(rows[rank][0]) for rank in grid.row(replica)}
            if len(found) > 1:
                raise EngineError(
                    f"the processes of replica {replica} got different micro-batches at ticks {ticks[0]} to {ticks[-1]}: "
                    "a data set or collator that draws random numbers of its own; seed it alike in all processes"
                )
        last = [rows[rank] for rank in grid.column(self._placement[-1])]
        losses = [sum(float(row[2 + i]) for row in last) / grid.replicas for i in range(count)]
        norms: list[float | None] = []
        for stage, device in enumerate(self._placement):
            present, norm = rows[grid.rank_of(device, 0)][2 + count + 2 * stage :][:2].tolist()
            norms.append(norm if present else None)
        return UpdateReport(sent.update, ticks, losses, norms, any(bool(row[1]) for row in rows))


def fingerprint(batch: Mapping[str, Any], start: int = 0) -> int:
    """A checksum of a micro-batch's tensors on top of an earlier one, below 2**32; those off the CPU are left out."""
    for key in sorted(batch):
        value = batch[key]
        if torch.is_tensor(value) and value.device.type == "cpu":
            start = tensor_checksum(value, start)
    return start


def tensor_checksum(tensor: torch.Tensor, start: int = 0) -> int:
    """A checksum of a tensor's bytes on the CPU, on top of an earlier one, below 2**32."""
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, start)
