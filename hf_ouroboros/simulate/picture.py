"""A timeline as a PNG: a Gantt chart of a few steady ticks, and how busy each device was over the whole run.

cpu:0   |F|BB|BB|F|BB|BB|F|      98 %      colour = kind, pale = the device's second stage,
cpu:1   |F|BB|..|F|BB|..|F|      75 %      number = tick, grey = waiting
        --------------------- ms
overview: one strip per device, dark = busy
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ouroboros.simulate.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOW_TICKS = 14  # ticks in the large panel
OVERVIEW_BINS = 160  # columns of the overview, at most
DPI = 110
COLOURS = {
    "forward": "#3b78b8",
    "backward": "#d9772b",
    "weights": "#e3b23c",
    "recompute": "#4fa3a5",
    "step": "#2f2f36",
    "settle": "#8a5bb0",
}
IDLE, INK = "#e9e9ec", "#1c1c22"
TINTS = (0.0, 0.55, 0.78)  # towards white: a device's first, second, third and further stages
Colour = tuple[float, float, float]  # red, green, blue
Ranks = dict[tuple[int, int | None], int]
FONT_SIZES = (9.0, 8.0, 7.0)  # of the numbers in the boxes: the largest that fits
NUMBERED_ROWS = 32  # with more devices, nobody reads thousands of numbers, which take most of the time


def draw(
    timeline: Timeline,
    path: str | Path,
    *,
    title: str | None = None,
    window: tuple[float, float] | None = None,
) -> Path:
    """Draw the timeline into a PNG file; safe to call from any thread.

    Args:
        timeline: what to draw; may be empty.
        path: the file to write; its folder exists.
        title: heading; names devices and ticks where not given.
        window: (start, end) of the large panel in seconds on the timeline's clock; by default the whole run
            where it is short, else `WINDOW_TICKS` whole ticks from its middle. Where the run is longer than
            the window, the overview is drawn beneath.

    Raises:
        ValueError: if the window is empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole = timeline.interval
    shown = default_window(timeline) if window is None else window
    if window is not None and window[1] <= window[0]:
        raise ValueError(f"window={window} is empty; give (start, end) in seconds with start < end.")
    overview = whole[0] < shown[0] or shown[1] < whole[1]
    rows = timeline.num_devices
    gantt_height, strip_height = 0.62 * rows, 0.24 * rows if overview else 0.0
    margins = {"top": 0.8, "between": 0.85 if overview else 0.0, "bottom": 0.6}
    height = gantt_height + strip_height + sum(margins.values())
    figure = Figure(figsize=(14, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    ranks = _stage_ranks(timeline)
    labels = [_row_label(timeline, i, ranks) for i in range(rows)]
    label_width = 0.3 + 0.085 * max(len(line) for label in labels for line in label.split("\n"))
    left, width = label_width / 14, (14 - label_width - 0.95) / 14
    bottom = margins["bottom"] + strip_height + margins["between"]
    axes = figure.add_axes((left, bottom / height, width, gantt_height / height))
    _gantt(axes, timeline, shown, width * 14 * 72, ranks, labels)
    if overview:
        strip = figure.add_axes((left, margins["bottom"] / height, width, strip_height / height))
        _strips(strip, timeline, shown)
    heading = title if title is not None else _heading(timeline, shown)
    figure.text(0.3 / 14, 1 - 0.2 / height, heading, fontsize=13, color=INK, va="top", weight="bold", parse_math=False)
    _legend(figure, timeline, 1 - 0.46 / height, any(rank > 0 for rank in ranks.values()))
    path = Path(path)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def default_window(timeline: Timeline) -> tuple[float, float]:
    """The whole run if hardly longer than `WINDOW_TICKS` ticks, else that many whole ticks in its middle."""
    ends = sorted(timeline.forward_ends().values())
    if len(ends) <= WINDOW_TICKS + 2:
        return timeline.interval
    first = (len(ends) - WINDOW_TICKS) // 2
    return ends[first - 1], ends[first - 1 + WINDOW_TICKS]


def _gantt(
    axes: Axes,
    timeline: Timeline,
    shown: tuple[float, float],
    width_points: float,
    ranks: Ranks,
    labels: Sequence[str],
) -> None:
    """One row per device; x in ms since the start of the run."""
    zero = timeline.interval[0]
    start, end = ((t - zero) * 1e3 for t in shown)
    span = (end - start) or 1.0
    boxes: list[list[tuple[float, float]]] = [[] for _ in range(timeline.num_devices)]
    faces: list[list[Colour]] = [[] for _ in range(timeline.num_devices)]
    for e in timeline.events:
        if not e.is_work or e.end <= shown[0] or e.start >= shown[1]:
            continue
        x0, x1 = max((e.start - zero) * 1e3, start), min((e.end - zero) * 1e3, end)
        rank = ranks.get((e.device, e.stage), 0)
        boxes[e.device].append((x0, x1 - x0))
        faces[e.device].append(_tint(COLOURS[e.kind], rank))
        size, rotation = _fit(str(e.index), (x1 - x0) / span * width_points)
        if e.kind != "step" and size and timeline.num_devices <= NUMBERED_ROWS:
            axes.text(
                (x0 + x1) / 2,
                e.device,
                str(e.index),
                ha="center",
                va="center" if rotation else "center_baseline",
                fontsize=size,
                rotation=rotation,
                color="white" if rank == 0 else INK,
            )
    for device in range(timeline.num_devices):  # one call for all boxes of a row: each costs a millisecond or two
        axes.broken_barh([(start, span)], (device - 0.4, 0.8), facecolors=IDLE, linewidth=0)
        row = device - 0.4, 0.8
        axes.broken_barh(boxes[device], row, facecolors=faces[device], edgecolors="white", linewidth=0.6)
    for device, share in enumerate(timeline.busy_shares(*shown)):
        axes.text(1.012, device, f"{share:.0%}", transform=axes.get_yaxis_transform(), fontsize=11, va="center")
    axes.text(1.012, -0.62, "busy", transform=axes.get_yaxis_transform(), fontsize=9, color=INK)
    axes.set_xlim(start, start + span)
    _rows(axes, timeline, labels)
    axes.set_xlabel("ms since the start of the run", fontsize=9, labelpad=2)


def _fit(label: str, points: float) -> tuple[float, int]:
    """Font size and rotation at which a label fits into a box `points` wide; size 0 if it does not fit.

    A digit is about 0.64 em wide and 0.75 em high; a row is high enough for five upright digits.
    """
    for size in FONT_SIZES:
        if 0.64 * size * len(label) + 2.0 <= points:
            return size, 0
    for size in FONT_SIZES:
        if 0.75 * size + 4.0 <= points and len(label) <= 5:
            return size, 90
    return 0.0, 0


def _tint(colour: str, rank: int) -> Colour:
    """The colour for a device's stage of this rank: as it is for the first, paler for the next."""
    from matplotlib.colors import to_rgb

    red, green, blue = (c + (1 - c) * TINTS[min(rank, len(TINTS) - 1)] for c in to_rgb(colour))
    return red, green, blue


def _strips(axes: Axes, timeline: Timeline, shown: tuple[float, float]) -> None:
    """The whole run: one strip per device, the darker the busier; a frame marks the large panel's window."""
    start, end = timeline.interval
    bins = max(8, min(OVERVIEW_BINS, len(timeline.forward_ends()) // 2))
    grid = [busy_profile(timeline, device, bins) for device in range(timeline.num_devices)]
    low, high = 0.0, (end - start) * 1e3
    box = (low, high, timeline.num_devices - 0.5, -0.5)
    axes.imshow(grid, aspect="auto", cmap="Greys", vmin=-0.1, vmax=1.25, extent=box, interpolation="nearest")
    for edge in range(1, timeline.num_devices):
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
    axes.axvspan(
        (shown[0] - start) * 1e3,
        (shown[1] - start) * 1e3,
        facecolor="none",
        edgecolor="#c2185b",
        linewidth=1.6,
    )
    for device, share in enumerate(timeline.busy_shares()):
        axes.text(1.012, device, f"{share:.0%}", transform=axes.get_yaxis_transform(), fontsize=9, va="center")
    axes.set_xlim(low, high)
    _rows(axes, timeline, timeline.device_names)
    axes.set_title("whole run: the darker, the busier; the frame is the part above", fontsize=9, loc="left", pad=4)
    axes.set_xlabel("ms", fontsize=9, labelpad=2)


def busy_profile(timeline: Timeline, device: int, bins: int) -> list[float]:
    """Busy share of a device in each of `bins` equal parts of the run."""
    start, end = timeline.interval
    width = (end - start) / bins
    shares = [0.0] * bins
    if width == 0:
        return shares
    for a, b in timeline.busy_intervals(device):
        for i in range(int((a - start) / width), min(bins - 1, int((b - start) / width)) + 1):
            shares[i] += max(0.0, min(b, start + (i + 1) * width) - max(a, start + i * width)) / width
    return shares


def _rows(axes: Axes, timeline: Timeline, labels: Sequence[str]) -> None:
    """Device 0 on top, its name at the left, no frame."""
    axes.set_ylim(timeline.num_devices - 0.5, -0.5)
    axes.set_yticks(range(timeline.num_devices), labels, parse_math=False)  # a name is no formula
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=8.5, color="#999999")
    axes.spines[:].set_visible(False)


def _legend(figure: Figure, timeline: Timeline, top: float, two_stages: bool) -> None:
    """What each colour means, for the kinds and stage shades that occur."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    occurring = {e.kind for e in timeline.events}
    handles: list[Patch | tuple[Patch, ...]] = [
        Patch(facecolor=colour) for kind, colour in COLOURS.items() if kind in occurring
    ]
    labels = [kind for kind in COLOURS if kind in occurring]
    if two_stages:
        handles.append(tuple(Patch(facecolor=_tint(COLOURS[kind], 1)) for kind in ("forward", "backward")))
        labels.append("the device's second stage")
    handles.append(Patch(facecolor=IDLE))
    labels.append("waiting")
    figure.legend(  # type: ignore[call-overload]  # does not know that a handle may be a tuple, for a HandlerTuple
        handles,
        labels,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.0)},
        loc="upper left",
        bbox_to_anchor=(0.3 / 14, top),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        handlelength=1.6,
        borderaxespad=0.0,
        borderpad=0.0,
    )


def _heading(timeline: Timeline, shown: tuple[float, float]) -> str:
    ends = timeline.forward_ends()
    devices = f"{timeline.num_devices} device{'s' if timeline.num_devices > 1 else ''}"
    visible = [t for t, end in ends.items() if shown[0] < end <= shown[1]]
    if not visible:
        return devices
    return f"{devices}, ticks {visible[0]} to {visible[-1]} of {len(ends)}"


def _stage_ranks(timeline: Timeline) -> Ranks:
    """(device, stage) -> 0 for the device's lowest stage, 1 for its next, ..."""
    stages = {(e.device, e.stage) for e in timeline.events if e.stage is not None}
    return {(d, s): sum(1 for other, t in stages if other == d and t < s) for d, s in stages}


def _row_label(timeline: Timeline, device: int, ranks: Ranks) -> str:
    stages = sorted(s for d, s in ranks if d == device and s is not None)
    if not stages:
        return timeline.device_names[device]
    plural = "s" if len(stages) > 1 else ""
    return f"{timeline.device_names[device]}\nstage{plural} {', '.join(map(str, stages))}"
