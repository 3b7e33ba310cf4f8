"""What each device did and when: one record for measured and predicted runs, and its Chrome trace form.

device 0  |F0 t4|B2 t2|B0 t0|F0 t5| ... |S0 u1|
device 1  |F1 t3|B1 t1|-wait-|F1 t4| ...
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from hf_ouroboros.options import Number, Rule, Whole, shown
from hf_ouroboros.user_files import written_together

KINDS = ("forward", "backward", "weights", "recompute", "step", "settle", "wait")
_NAMES = {
    "forward": "F",
    "backward": "B",
    "weights": "W",  # gradients of the weights, in schedules that take them on their own
    "recompute": "R",
    "step": "S",
    "settle": "settle",
    "wait": "wait",
}
MOST_DEVICES, LONGEST_NAME = 512, 80  # rows of a picture, and letters before them
_DEVICE, _COUNT, _MICROSECONDS = Whole(0, MOST_DEVICES - 1), Whole(0, 2**53), Number(0.0, 1e14)


@dataclass(frozen=True)
class Event:
    """One thing one device did, without interruption.

    Args:
        device: index of the device, from 0.
        stage: the stage it worked for, or None where no stage is concerned.
        kind: one of `KINDS`; "wait" is time spent waiting for an input, all others are work.
        index: the update for "step", the tick for every other kind.
        start: seconds on the clock that all devices of the run share.
        end: seconds on the same clock.

    Raises:
        ValueError: for an unknown kind, or an end before the start.
    """

    device: int
    stage: int | None
    kind: str
    index: int
    start: float
    end: float

    def __post_init__(self) -> None:
        if self.kind not in _NAMES:
            raise ValueError(f"Event kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}.")
        if not self.end >= self.start:
            raise ValueError(f"Event {self.name!r} ends at {self.end} s, before its start at {self.start} s.")

    @property
    def name(self) -> str:
        """Short label: letter of the kind, stage, then tick or update, as in "F2 t17" or "S0 u4"."""
        stage = "" if self.stage is None else self.stage
        return f"{_NAMES[self.kind]}{stage} {'u' if self.kind == 'step' else 't'}{self.index}"

    @property
    def is_work(self) -> bool:
        """Whether the device was busy."""
        return self.kind != "wait"


class DeviceSummary(TypedDict):
    """One device over the whole run; times in seconds, `waiting` is all time that no work covers."""

    device: int
    name: str
    busy_share: float
    seconds: dict[str, float]
    waiting: float


class Timeline:
    """The events of one run.

    Args:
        num_devices: how many devices there are, whether or not they have events.
        device_names: their names in order; "device i" where not given.

    Raises:
        ValueError: if there are no devices, or not one name per device.
    """

    def __init__(self, num_devices: int, device_names: Sequence[str] | None = None) -> None:
        if num_devices < 1:
            raise ValueError(f"A timeline needs num_devices >= 1, found {num_devices}.")
        names = [f"device {i}" for i in range(num_devices)] if device_names is None else list(device_names)
        if len(names) != num_devices:
            raise ValueError(f"device_names has {len(names)} names for {num_devices} devices; give one per device.")
        self.num_devices = num_devices
        self.device_names = names
        self._events: list[Event] = []

    def record(self, event: Event) -> None:
        """Add an event; any thread, any order, no lock (a list's append is atomic).

        Raises:
            ValueError: if the event's device is not one of this timeline's.
        """
        if not 0 <= event.device < self.num_devices:
            raise ValueError(f"Event {event.name!r} is on device {event.device} of {self.num_devices} devices.")
        self._events.append(event)

    @property
    def events(self) -> list[Event]:
        """A copy of the events so far, sorted by start."""
        return sorted(self._events.copy(), key=lambda e: (e.start, e.device, e.end))

    @property
    def interval(self) -> tuple[float, float]:
        """First start and last end of all events, in seconds; (0, 0) without events."""
        events = self._events.copy()
        return min((e.start for e in events), default=0.0), max((e.end for e in events), default=0.0)

    def busy_intervals(self, device: int) -> list[tuple[float, float]]:
        """Disjoint (start, end) of the device's work, in order; nested and touching events are merged."""
        return _merged((e.start, e.end) for e in self._events.copy() if e.device == device and e.is_work)

    def busy_share(self, device: int, start: float | None = None, end: float | None = None) -> float:
        """Share of [start, end] (default: the whole run) in which the device worked; 0 if that is empty."""
        return self.busy_shares(start, end)[device]

    def busy_shares(self, start: float | None = None, end: float | None = None) -> list[float]:
        """`busy_share` of every device, in order."""
        first, last = self.interval
        start, end = first if start is None else start, last if end is None else end
        if end <= start:
            return [0.0] * self.num_devices
        work: list[list[tuple[float, float]]] = [[] for _ in range(self.num_devices)]
        for e in self._events.copy():
            if e.is_work and e.end > start and e.start < end:
                work[e.device].append((max(e.start, start), min(e.end, end)))
        return [min(1.0, math.fsum(b - a for a, b in _merged(own)) / (end - start)) for own in work]

    def forward_ends(self, stage: int | None = None) -> dict[int, float]:
        """Tick -> when its forward had passed `stage`, or every stage, in seconds; ticks in ascending order."""
        ends: dict[int, float] = {}
        for e in self._events.copy():
            if e.kind == "forward" and stage in (None, e.stage):
                ends[e.index] = max(e.end, ends.get(e.index, e.end))
        return dict(sorted(ends.items()))

    def steady_interval(self, after_tick: int, multiple_of: int = 1, stage: int | None = None) -> tuple[float, float]:
        """The part of the run that neither filling nor draining distorts, in whole ticks.

        It begins when tick `after_tick - 1` has been forward through every stage. Draining begins when some
        stage (the first one, in a pipeline) has done its last forward; the interval ends with the last tick
        that had been forward through every stage by then. Both ends are the same point of a tick, so in a
        periodic schedule the shares over it are those of the endless run.

        Args:
            after_tick: how many ticks to leave out at the start; K is enough to fill a pipeline of K stages.
            multiple_of: the number of ticks in it is a multiple of this; M where the period is an update.
            stage: the one through which ticks have been, instead of all; the device of this stage has done
                whole ticks of its program in the interval, even where others are still catching up.

        Raises:
            ValueError: if the run is too short to hold such an interval.
        """
        ends = self.forward_ends(stage)
        last_of_stage: dict[int | None, float] = {}
        for e in self._events.copy():
            if e.kind == "forward":
                last_of_stage[e.stage] = max(e.end, last_of_stage.get(e.stage, e.end))
        drain = min(last_of_stage.values(), default=0.0)
        before = max((end for tick, end in ends.items() if tick < after_tick), default=self.interval[0])
        closed = [end for tick, end in ends.items() if tick >= after_tick and before < end <= drain]
        whole = len(closed) // multiple_of * multiple_of
        if whole == 0:
            raise ValueError(
                f"No steady interval: of {len(ends)} ticks, {len(closed)} lie between the first {after_tick} "
                f"and the drain, {multiple_of} needed; record a longer run or leave out fewer ticks."
            )
        return before, sorted(closed)[whole - 1]

    def summary(self) -> list[DeviceSummary]:
        """Per device, over the whole run: busy share, seconds by kind (only kinds that occurred), waiting."""
        start, end = self.interval
        events = self.events
        rows: list[DeviceSummary] = []
        for device, name in enumerate(self.device_names):
            own = [e for e in events if e.device == device]
            seconds = {kind: math.fsum(e.end - e.start for e in own if e.kind == kind) for kind in KINDS}
            busy = self.busy_share(device)
            rows.append(
                DeviceSummary(
                    device=device,
                    name=name,
                    busy_share=busy,
                    seconds={k: s for k, s in seconds.items() if any(e.kind == k for e in own)},
                    waiting=(1.0 - busy) * (end - start),
                )
            )
        return rows

    def to_chrome_trace(self) -> dict[str, Any]:
        """The run in Chrome's trace event format, which Perfetto opens: microseconds from the first start."""
        zero = self.interval[0]
        rows: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": name}}
            for i, name in enumerate(self.device_names)
        ]
        for e in self.events:
            ts, te = round((e.start - zero) * 1e6, 3), round((e.end - zero) * 1e6, 3)
            args = {"stage": e.stage, "update" if e.kind == "step" else "tick": e.index}
            row = {"name": e.name, "cat": e.kind, "ph": "X", "pid": 0, "tid": e.device, "ts": ts}
            rows.append(row | {"dur": round(te - ts, 3), "args": args})
        return {"traceEvents": rows, "displayTimeUnit": "ms"}

    @classmethod
    def from_chrome_trace(cls, trace: dict[str, Any]) -> Timeline:
        """Read back what `to_chrome_trace` wrote; times start at zero and are exact to a nanosecond.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        rows: Iterable[dict[str, Any]] = trace["traceEvents"]
        names = {_read(row, "tid", _DEVICE): row["args"]["name"] for row in rows if row["ph"] == "M"}
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"it names the devices {shown(sorted(names))}; they must be numbered from 0")
        for name in names.values():
            if not isinstance(name, str) or not name.isprintable() or len(name) > LONGEST_NAME:
                raise ValueError(f"a device is named {shown(name)}; use up to {LONGEST_NAME} printable characters")
        timeline = cls(len(names), [names[i] for i in range(len(names))])
        for row in rows:
            if row["ph"] == "X":
                start, span = _read(row, "ts", _MICROSECONDS), _read(row, "dur", _MICROSECONDS)
                stage = None if row["args"]["stage"] is None else _read(row["args"], "stage", _DEVICE)
                index = _read(row["args"], "update" if row["cat"] == "step" else "tick", _COUNT)
                event = Event(_read(row, "tid", _DEVICE), stage, row["cat"], index, start / 1e6, (start + span) / 1e6)
                timeline.record(event)
        return timeline

    def write(self, path: str | Path, *, title: str | None = None) -> tuple[Path, Path]:
        """Write `<path>.json` (Chrome trace) and `<path>.png` (picture); `path` may carry either suffix.

        Returns:
            The two paths. Missing parent folders are created.

        Raises:
            OutputFileError: they can't be written; then neither is.
        """
        from hf_ouroboros.simulate.picture import draw

        trace, picture = timeline_files(path)
        with written_together(trace, picture) as (new_trace, new_picture):
            new_trace.write_text(json.dumps(self.to_chrome_trace(), separators=(",", ":")) + "\n", encoding="utf-8")
            draw(self, new_picture, title=title)
        return trace, picture


def _merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint intervals in order, nested and touching ones merged."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _read(row: dict[str, Any], name: str, rule: Rule) -> Any:
    """What a row of a trace file says under a name."""
    try:
        return rule.read(row[name])
    except ValueError:
        raise ValueError(f"{name}={rule.refusal(row[name])}") from None


def timeline_files(path: str | Path) -> tuple[Path, Path]:
    """The trace and the picture that `Timeline.write(path)` makes; `path` may carry either suffix."""
    path = Path(path)
    if path.suffix.lower() in (".json", ".png"):
        path = path.with_suffix("")
    return path.with_name(path.name + ".json"), path.with_name(path.name + ".png")
