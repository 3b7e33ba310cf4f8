"""The timeline's arithmetic, its Chrome trace form, and the files it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ouroboros.simulate.timeline import KINDS, Event, Timeline


def two_devices(ticks: int) -> Timeline:
    """A period of 4 s per tick: device 0 works 3 s of it (forward 1, backward 2), device 1 all of it.

    Stage 1's forward of a tick begins when stage 0's has ended.
    """
    timeline = Timeline(2, ["cpu:0", "cpu:1"])
    for t in range(ticks):
        zero = 100.0 + 4.0 * t
        timeline.record(Event(1, 1, "backward", t, zero + 3, zero + 5))  # recorded out of order on purpose
        timeline.record(Event(0, 0, "forward", t, zero, zero + 1))
        timeline.record(Event(0, 0, "backward", t, zero + 1, zero + 3))
        timeline.record(Event(0, 0, "wait", t, zero + 3, zero + 4))
        timeline.record(Event(1, 1, "forward", t, zero + 1, zero + 3))
    return timeline


def test_events_are_sorted_by_start() -> None:
    starts = [e.start for e in two_devices(5).events]
    assert starts == sorted(starts)
    assert len(starts) == 25


def test_event_names() -> None:
    assert Event(0, 2, "forward", 17, 0, 1).name == "F2 t17"
    assert Event(0, 0, "backward", 3, 0, 1).name == "B0 t3"
    assert Event(0, 1, "recompute", 3, 0, 1).name == "R1 t3"
    assert Event(0, 0, "step", 4, 0, 1).name == "S0 u4"
    assert Event(0, None, "wait", 4, 0, 1).name == "wait t4"


def test_busy_share_counts_work_only() -> None:
    timeline = two_devices(10)
    assert timeline.interval == (100.0, 141.0)
    assert timeline.busy_shares() == pytest.approx([30 / 41, 40 / 41])
    assert timeline.busy_share(0, 102, 104) == pytest.approx(0.5)  # an event that begins before the interval
    assert timeline.busy_share(0, 100, 102.5) == 1.0  # an event that ends after it
    assert timeline.busy_share(0, 103, 104) == 0.0  # waiting
    assert timeline.busy_share(0, 104, 104) == 0.0  # no interval
    assert timeline.busy_share(0, 96, 104) == pytest.approx(3 / 8)  # begins before the run


def test_nested_events_count_once() -> None:
    timeline = Timeline(1)
    timeline.record(Event(0, 0, "backward", 0, 0.0, 4.0))
    timeline.record(Event(0, 0, "recompute", 0, 1.0, 2.0))
    timeline.record(Event(0, 0, "step", 0, 4.0, 5.0))
    timeline.record(Event(0, 0, "forward", 1, 9.0, 10.0))
    assert timeline.busy_intervals(0) == [(0.0, 5.0), (9.0, 10.0)]
    assert timeline.busy_share(0) == pytest.approx(0.6)


def test_an_empty_timeline_is_idle() -> None:
    timeline = Timeline(2)
    assert timeline.interval == (0.0, 0.0)
    assert timeline.busy_shares() == [0.0, 0.0]
    assert timeline.forward_ends() == {}
    assert [row["waiting"] for row in timeline.summary()] == [0.0, 0.0]


def test_steady_interval_is_whole_ticks_without_fill_and_drain() -> None:
    timeline = two_devices(10)
    start, end = timeline.steady_interval(2)
    # Tick 1 has passed stage 1 at 107; stage 0's last forward ends at 137, tick 8 had passed stage 1 at 135.
    assert (start, end) == (107.0, 135.0)
    assert timeline.busy_shares(start, end) == pytest.approx([3 / 4, 1.0])


def test_steady_interval_keeps_whole_updates_where_asked() -> None:
    timeline = two_devices(10)
    assert timeline.steady_interval(2, multiple_of=4) == (107.0, 123.0)
    assert timeline.steady_interval(2, multiple_of=7) == (107.0, 135.0)
    with pytest.raises(ValueError, match="8 needed; record a longer run"):
        timeline.steady_interval(2, multiple_of=8)


def test_steady_interval_seen_from_one_stage() -> None:
    timeline = two_devices(10)
    first = timeline.forward_ends(0)
    assert first != timeline.forward_ends(1) == timeline.forward_ends()
    assert timeline.steady_interval(2, stage=0) == (first[1], first[9])
    assert timeline.steady_interval(2, stage=1) == timeline.steady_interval(2)


@pytest.mark.parametrize("ticks", [0, 1, 2, 3])
def test_steady_interval_refuses_a_short_run(ticks: int) -> None:
    with pytest.raises(ValueError, match="No steady interval"):
        two_devices(ticks).steady_interval(2)


def test_summary() -> None:
    first, second = two_devices(10).summary()
    assert first["name"] == "cpu:0"
    assert first["seconds"] == pytest.approx({"forward": 10.0, "backward": 20.0, "wait": 10.0})
    assert first["busy_share"] == pytest.approx(30 / 41)
    assert first["waiting"] == pytest.approx(11.0)  # 10 s recorded, 1 s after its last event
    assert second["device"] == 1
    assert set(second["seconds"]) == {"forward", "backward"}


def test_chrome_trace_rows() -> None:
    timeline = two_devices(1)
    timeline.record(Event(0, 0, "step", 0, 104.0, 104.5))
    rows = timeline.to_chrome_trace()["traceEvents"]
    assert rows[0] == {"name": "thread_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "cpu:0"}}
    assert rows[2] == {
        **{"name": "F0 t0", "cat": "forward", "ph": "X", "pid": 0, "tid": 0},
        **{"ts": 0.0, "dur": 1e6, "args": {"stage": 0, "tick": 0}},
    }
    assert rows[-1]["args"] == {"stage": 0, "update": 0}


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    devices = draw(st.integers(1, 4))
    timeline = Timeline(devices, [f"cuda:{i}" for i in range(devices)])
    nanoseconds = st.integers(0, 10**12)
    for _ in range(draw(st.integers(0, 12))):
        start, end = sorted((draw(nanoseconds), draw(nanoseconds)))
        stage = draw(st.none() | st.integers(0, 8))
        device, kind = draw(st.integers(0, devices - 1)), draw(st.sampled_from(KINDS))
        timeline.record(Event(device, stage, kind, draw(st.integers(0, 99)), start / 1e9, end / 1e9))
    return timeline


@settings(deadline=None)
@given(timelines())
def test_chrome_trace_round_trip(timeline: Timeline) -> None:
    trace = json.loads(json.dumps(timeline.to_chrome_trace()))
    back = Timeline.from_chrome_trace(trace)
    assert back.device_names == timeline.device_names
    zero = timeline.interval[0]

    def rounded(events: list[Event], origin: float) -> list[tuple[object, ...]]:
        return sorted(
            (e.device, -1 if e.stage is None else e.stage, e.kind, e.index, *times)
            for e in events
            for times in [(round((e.start - origin) * 1e9), round((e.end - origin) * 1e9))]
        )

    assert rounded(back.events, 0.0) == rounded(timeline.events, zero)


@settings(deadline=None)
@given(timelines())
def test_busy_share_is_a_share_and_adds_up(timeline: Timeline) -> None:
    start, end = timeline.interval
    middle = (start + end) / 2
    for device in range(timeline.num_devices):
        halves = timeline.busy_share(device, start, middle) + timeline.busy_share(device, middle, end)
        assert 0.0 <= timeline.busy_share(device) <= 1.0
        assert halves / 2 == pytest.approx(timeline.busy_share(device))  # sums of floats in another order


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "run.json", "run.png", "run.v1", "deep/er/run"])
def test_write(tmp_path: Path, name: str) -> None:
    trace, picture = two_devices(20).write(tmp_path / name)
    stem = name.removesuffix(".json").removesuffix(".png")
    assert (trace, picture) == (tmp_path / f"{stem}.json", tmp_path / f"{stem}.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    back = Timeline.from_chrome_trace(json.loads(trace.read_text()))
    assert back.busy_shares() == pytest.approx(two_devices(20).busy_shares())


def test_threads_record_at_once() -> None:
    timeline = Timeline(8)

    def work(device: int) -> None:
        for t in range(500):
            timeline.record(Event(device, device, "forward", t, float(t), t + 0.5))
            if t % 100 == 0:
                timeline.busy_shares()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timeline.events) == 4000
    assert timeline.busy_share(3, 0.0, 500.0) == pytest.approx(0.5)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="num_devices >= 1, found 0"):
        Timeline(0)
    with pytest.raises(ValueError, match="1 names for 2 devices"):
        Timeline(2, ["cpu:0"])
    with pytest.raises(ValueError, match="'foward' is unknown; use one of forward"):
        Event(0, 0, "foward", 0, 0.0, 1.0)
    with pytest.raises(ValueError, match="before its start"):
        Event(0, 0, "forward", 0, 1.0, 0.5)
    with pytest.raises(ValueError, match="device 2 of 2 devices"):
        Timeline(2).record(Event(2, 0, "forward", 0, 0.0, 1.0))


def test_torch_and_matplotlib_are_not_imported() -> None:
    code = "import sys, hf_ouroboros.simulate.simulator; print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
