"""Streams: which micro-batch continues which, and what every stage remembers of the one before.

A text in contiguous columns is read segment by segment (`data/stream.py`). A micro-batch holds one segment of a *group*
of consecutive columns, and says so: `stream_columns` and `stream_segments`, one number per row. M = 2 micro-batches that
split four columns, and M = 2 consecutive segments of one group:

    tick      0    1    2    3    4              tick      0    1    2    3    4
    columns   0-1  2-3  0-1  2-3  0-1            columns   0-3  0-3  0-3  0-3  0-3
    segment   0    0    1    1    2              segment   0    1    2    3    4

What a stage remembers of a tick (the detached inputs of its layers, at the weights of that tick's forward) is what it
attends to at the next tick of the same group. Forwards of a stage are in tick order under every schedule, so this needs
no other stage and no waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import StreamError
from ..partition import Memory

COLUMNS, SEGMENTS = "stream_columns", "stream_segments"
_ADVICE = (
    "memories go on from one segment of a column to the next, so the rows have to come in order: "
    "train_sampling_strategy='sequential', dataloader_drop_last=True, and a per-device batch size that, times the "
    "replicas, divides the stream's columns. Leave stream_columns and stream_segments out of the batches to train "
    "without memory"
)


@dataclass(frozen=True)
class Segment:
    """A micro-batch's place in its stream, as the stages need it.

    Args:
        group: its first column, which names the group.
        continues: whether it goes on where the group's memory ends; otherwise it starts without memory.
        starts_epoch: whether everything that was remembered is out of date.
    """

    group: int
    continues: bool = False
    starts_epoch: bool = False


class Streams:
    """Follows the column groups of a run; on the host, before any device is involved.

    Attributes:
        positions: {group: (number of its columns, its next segment)}.
    """

    def __init__(self) -> None:
        self.positions: dict[int, tuple[int, int]] = {}

    def enter(self, batch: Mapping[str, Any]) -> Segment | None:
        """Takes in the next micro-batch.

        Args:
            batch: with `stream_columns` and `stream_segments`, int64 [batch] on the CPU, or without both.

        Returns:
            Its place; None for a batch that is no part of a stream.

        Raises:
            StreamError: rows of several segments or columns with gaps, or a segment that doesn't follow its group's last.
        """
        if COLUMNS not in batch and SEGMENTS not in batch:
            return None
        if COLUMNS not in batch or SEGMENTS not in batch:
            missing = SEGMENTS if COLUMNS in batch else COLUMNS
            raise StreamError(
                f"a batch has no {missing}, but {COLUMNS if missing == SEGMENTS else SEGMENTS}; give both"
            )
        columns, segments = batch[COLUMNS].tolist(), batch[SEGMENTS].tolist()
        group, width, number = columns[0], len(columns), segments[0]
        if columns != list(range(group, group + width)) or set(segments) != {number}:
            raise StreamError(
                f"the rows of a batch are segments {_few(segments)} of columns {_few(columns)}, but must be one segment of "
                f"consecutive columns; {_ADVICE}"
            )
        known = {g: p for g, p in self.positions.items() if g < group + width and group < g + p[0]}
        starts_epoch = number == 0 and bool(known)
        if number > 0 and known and known != {group: (width, number)}:
            expected = ", ".join(f"segment {n} of columns {g} to {g + w - 1}" for g, (w, n) in sorted(known.items()))
            raise StreamError(
                f"a batch holds segment {number} of columns {group} to {group + width - 1}, but next come {expected}; "
                f"{_ADVICE}"
            )
        if starts_epoch:
            self.positions.clear()
        self.positions[group] = width, number + 1
        return Segment(group, continues=number > 0 and bool(known), starts_epoch=starts_epoch)


class Memories:
    """What one stage remembers of every group of columns.

    Attributes:
        groups: {group: memory}; the tensors are never written to.
    """

    def __init__(self) -> None:
        self.groups: dict[int, Memory] = {}

    def recall(self, segment: Segment | None) -> Memory | None:
        """What the stage's forward of a micro-batch is given, and overwrites; None for a batch without place."""
        if segment is None:
            return None
        if segment.starts_epoch:
            self.groups.clear()
        return dict(self.groups[segment.group]) if segment.continues else {}

    def keep(self, segment: Segment | None, memory: Memory | None) -> None:
        """Takes what the forward left."""
        if segment is not None:
            self.groups[segment.group] = memory


class Reading:
    """One pass over a stream outside of training, from its beginning: an evaluation.

    Args:
        num_stages: K.
    """

    def __init__(self, num_stages: int):
        self.streams = Streams()
        self.memories = [Memories() for _ in range(num_stages)]


def memories_on(device: torch.device, groups: Mapping[int, Memory]) -> dict[int, Memory]:
    """Memories of all groups, copied to a device."""
    return {group: {n: t.to(device, copy=True) for n, t in memory.items()} for group, memory in groups.items()}


def _few(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:6]))
    return text if len(numbers) <= 6 else f"{text}, ..."
