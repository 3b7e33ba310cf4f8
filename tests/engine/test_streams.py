"""Which micro-batch continues which, and what is said when rows come in another order."""

from __future__ import annotations

import pytest
import torch
from stream_helpers import stream_batch

from hf_ouroboros.engine.streams import Memories, Segment, Streams
from hf_ouroboros.errors import StreamError


def test_two_groups_over_two_epochs() -> None:
    streams = Streams()
    order = [(0, 0), (2, 0), (0, 1), (2, 1), (0, 0), (2, 0), (0, 1)]
    found = [streams.enter(stream_batch(group, 2, segment)) for group, segment in order]
    assert found == [
        Segment(0),
        Segment(2),
        Segment(0, sources=((0, 0, 2),)),
        Segment(2, sources=((2, 0, 2),)),
        Segment(0, starts_epoch=True),
        Segment(2),
        Segment(0, sources=((0, 0, 2),)),
    ]
    assert streams.positions == {0: (2, 2), 2: (2, 1)}


def test_consecutive_segments_of_one_group() -> None:
    streams = Streams()
    assert [bool(streams.enter(stream_batch(4, 3, s)).sources) for s in range(4)] == [False, True, True, True]


def test_a_group_never_seen_starts_without_memory() -> None:
    streams = Streams()
    streams.enter(stream_batch(0, 2, 7))
    assert streams.enter(stream_batch(2, 2, 7)) == Segment(2)
    assert streams.enter(stream_batch(0, 2, 8)) == Segment(0, sources=((0, 0, 2),))


def test_batches_of_another_width_start_with_an_epoch() -> None:
    streams = Streams()
    for group in (0, 2):
        streams.enter(stream_batch(group, 2, 0))
    assert streams.enter(stream_batch(0, 4, 0)) == Segment(0, starts_epoch=True)
    assert streams.positions == {0: (4, 1)}


def test_columns_in_other_groups_than_before() -> None:
    """Two groups become one, and one becomes three; the memories of the columns go along."""
    streams, memories = Streams(), Memories()

    def read(group: int, width: int, segment: int) -> list[int]:
        """What the batch is given; what it leaves are the numbers of its columns, plus 10 per segment."""
        place = streams.enter(stream_batch(group, width, segment))
        given = memories.recall(place).get("layer", torch.zeros(0))
        memories.keep(place, {"layer": torch.arange(group, group + width) + 10 * segment})
        return given.tolist()

    assert [read(0, 2, 0), read(2, 2, 0)] == [[], []]
    assert read(0, 4, 1) == [0, 1, 2, 3]
    assert streams.positions == {0: (4, 2)}
    assert read(1, 2, 2) == [11, 12]
    assert streams.positions == {0: (1, 2), 1: (2, 3), 3: (1, 2)}
    assert len(memories.groups[3]["layer"].untyped_storage()) == 8  # nothing keeps the other rows alive
    assert [read(0, 1, 2), read(3, 1, 2)] == [[10], [13]]
    assert read(0, 4, 3) == [20, 21, 22, 23]
    assert memories.groups.keys() == streams.positions.keys() == {0}


def test_batches_that_are_no_part_of_a_stream() -> None:
    streams = Streams()
    streams.enter(stream_batch(0, 2, 0))
    assert streams.enter({"input_ids": torch.zeros(2, 3)}) is None
    assert streams.positions == {0: (2, 1)}


@pytest.mark.parametrize("missing", ["stream_columns", "stream_segments"])
def test_half_of_the_place(missing: str) -> None:
    batch = stream_batch(0, 2, 0)
    del batch[missing]
    with pytest.raises(StreamError, match=f"no {missing}"):
        Streams().enter(batch)


@pytest.mark.parametrize(
    ("columns", "segments", "message"),
    [
        ([0, 1, 0], [1, 1, 2], r"segments 1, 1, 2 of columns 0, 1, 0, .*divides the stream's columns"),
        ([0, 2], [1, 1], "columns 0, 2, but must be one segment of consecutive columns"),
        ([1, 0], [1, 1], "train_sampling_strategy='sequential'"),
        ([0, 1], [0, 3], "segments 0, 3"),
        (list(range(8, 0, -1)), [0] * 8, r"columns 8, 7, 6, 5, 4, 3, \.\.\."),
        ([0, 1], [2, 2], "segment 2 of columns 0 to 1, but next come segment 1 of columns 0 to 1;"),
        ([1, 2, 3], [2] * 3, "columns 1 to 3, but next come segment 1 of columns 0 to 1, segment 1 of columns 2 to 3;"),
        ([2, 3, 4], [1, 1, 1], "segment 1 of columns 2 to 4, but next come segment 1 of columns 2 to 3;"),
    ],
)
def test_rows_in_another_order(columns: list[int], segments: list[int], message: str) -> None:
    streams = Streams()
    for group in (0, 2):
        streams.enter(stream_batch(group, 2, 0))
    before = dict(streams.positions)
    batch = {"stream_columns": torch.tensor(columns), "stream_segments": torch.tensor(segments)}
    with pytest.raises(StreamError, match=message):
        streams.enter(batch)
    assert streams.positions == before  # a refused batch leaves everything as it was


def test_a_segment_twice() -> None:
    streams = Streams()
    for segment in (0, 1):
        streams.enter(stream_batch(0, 2, segment))
    with pytest.raises(StreamError, match="segment 1 of columns 0 to 1, but next come segment 2"):
        streams.enter(stream_batch(0, 2, 1))


def test_memories() -> None:
    memories = Memories()
    assert memories.recall(None) is None
    for group in (0, 2):
        memory = memories.recall(Segment(group))
        assert memory == {}
        memory["layer"] = torch.full((1,), group)
        memories.keep(Segment(group), memory)
    recalled = memories.recall(Segment(2, sources=((2, 0, 1),)))
    assert recalled["layer"].item() == 2
    memories.keep(Segment(2), recalled)
    memories.keep(None, None)
    assert sorted(memories.groups) == [0, 2]
    assert memories.recall(Segment(0, starts_epoch=True)) == {}
    assert memories.groups == {}
