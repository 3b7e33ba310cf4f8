"""Streams: which micro-batch continues which, and what every stage remembers of the one before.

A text in contiguous columns is read segment by segment (`data/stream.py`). A micro-batch holds one segment of a *group*
of consecutive columns, and says so: `stream_columns` and `stream_segments`, one number per row. M = 2 micro-batches that
split four columns, and M = 2 consecutive segments of one group:

    tick      0    1    2    3    4              tick      0    1    2    3    4
    columns   0-1  2-3  0-1  2-3  0-1            columns   0-3  0-3  0-3  0-3  0-3
    segment   0    0    1    1    2              segment   0    1    2    3    4

What a stage remembers of a tick (the detached inputs of its layers, at the weights of that tick's forward) is what it
attends to at the next tick of the same columns. Forwards of a stage are in tick order under every schedule, so this needs
no other stage and no waiting. If columns come in other groups than before, because a resumed run has another batch size or
another number of replicas, their memories are put together anew.
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
        sources: where the memory is that it goes on from: (group, first row, row after the last), usually all of the
            same group's; empty if it starts without memory.
        rest: what then remains of those groups, as groups of their own: (new group, group, first row, row after).
        starts_epoch: whether everything that was remembered is out of date.
    """

    group: int
    sources: tuple[tuple[int, int, int], ...] = ()
    rest: tuple[tuple[int, int, int, int], ...] = ()
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
            batch: with `stream_columns` and `stream_segments`, int64 [batch], or without both. They are read here, so
                they should be on the CPU, where reading waits for nothing.

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
        known = sorted((g, w, n) for g, (w, n) in self.positions.items() if g < group + width and group < g + w)
        if number == 0 or not known:
            segment = Segment(group, starts_epoch=bool(known))
        else:
            sources = tuple((g, max(group - g, 0), min(group + width - g, w)) for g, w, _ in known)
            if sum(b - a for _, a, b in sources) < width or any(n != number for *_, n in known):
                expected = ", ".join(f"segment {n} of columns {g} to {g + w - 1}" for g, w, n in known)
                raise StreamError(
                    f"a batch holds segment {number} of columns {group} to {group + width - 1}, but next come {expected}; "
                    f"{_ADVICE}"
                )
            before = [(g, g, 0, group - g) for g, _, _ in known if g < group]
            after = [(group + width, g, group + width - g, w) for g, w, _ in known if g + w > group + width]
            segment = Segment(group, sources, (*before, *after))
        if segment.starts_epoch:
            self.positions.clear()
        for g, *_ in segment.sources:
            del self.positions[g]
        self.positions |= {g: (b - a, number) for g, _, a, b in segment.rest}
        self.positions[group] = width, number + 1
        return segment


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
        taken = {group: self.groups.pop(group) for group, *_ in segment.sources}
        self.groups |= {new: _rows(taken[group], first, stop) for new, group, first, stop in segment.rest}
        parts = [_rows(taken[group], first, stop) for group, first, stop in segment.sources]
        if len(parts) < 2:
            return parts[0] if parts else {}
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def keep(self, segment: Segment | None, memory: Memory | None) -> None:
        """Takes what the forward left."""
        if segment is not None:
            assert memory is not None  # the forward was given one, as it was in a stream
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


def _rows(memory: Memory, first: int, stop: int) -> Memory:
    """Some rows; copies, where they are not all, so that the others can be let go."""
    return {name: t if stop - first == len(t) else t[first:stop].clone() for name, t in memory.items()}


def _few(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:6]))
    return text if len(numbers) <= 6 else f"{text}, ..."
