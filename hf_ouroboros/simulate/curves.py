"""Speed-up against the number of devices, or the speed of their links, one curve per schedule, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..schedules import DEFAULT, SCHEDULES
from .peers import PEERS
from .sharded import COLOUR, FSDP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, PALE = "#1c1c22", "#77777f"
PLOT, LABELS = 5.6, 2.3  # inches: width of a diagram and of the labels at its right
KNOWN_LINKS = (
    ("Ethernet, 1 Gbit/s", 0.125, "left"),
    ("riser, PCIe 3.0 x1", 1.0, "right"),
    ("Ethernet, 10 Gbit/s", 1.25, "left"),
    ("PCIe 3.0 x4", 4.0, "left"),
    ("PCIe 3.0 x16", 16.0, "left"),
)
"""Name, GB/s (rounded), and the side of the name that is at the line."""


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Args:
        title: above it.
        devices: how many there are, at every point.
        ideal: speed-up of the split at every point if no device ever waited.
        speedups: {schedule: speed-up at every point; None where it can't run}.
        links: GB/s at every point, ascending, of a diagram against links; else it is against devices, which then ascend.
    """

    title: str
    devices: Sequence[int]
    ideal: Sequence[float]
    speedups: Mapping[str, Sequence[float | None]]
    links: Sequence[float] | None = None

    @property
    def places(self) -> Sequence[float]:
        """Where its points are on the axis below."""
        return self.devices if self.links is None else self.links


def colour_of(schedule: str) -> str:
    """The colour of a schedule's curve."""
    others = PEERS | {FSDP: COLOUR}
    return SCHEDULES[schedule].colour if schedule in SCHEDULES else others.get(schedule, INK)


def draw_speedups(panels: Sequence[Panel], path: str | Path, *, title: str) -> Path:
    """Draws the panels side by side into a PNG file; its folder exists."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 0.9 + (PLOT + LABELS) * len(panels)
    figure = Figure(figsize=(width, 5.2), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.25 / width, 0.965, title, fontsize=12, color=INK, va="top", weight="bold", parse_math=False)
    top = max(max(panel.devices) for panel in panels)
    for i, panel in enumerate(panels):
        axes = figure.add_axes(((0.75 + (PLOT + LABELS) * i) / width, 0.105, PLOT / width, 0.74))
        _curves(axes, panel, top)
        axes.set_title(panel.title, fontsize=10, loc="left", color=INK, pad=6 if panel.links is None else 20)
        axes.set_ylabel("speed-up over one device", fontsize=9)
        axes.set_ylim(0, top * 1.04)
        axes.grid(axis="y", color="#ececef", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
        (_device_axis if panel.links is None else _link_axis)(axes, panel)
    path = Path(path)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _curves(axes: Axes, panel: Panel, top: float) -> None:
    """The curves, with their names and last values at the right."""
    axes.plot(panel.places, panel.devices, color="#b5b5bc", linestyle=(0, (2, 2)), linewidth=1)
    axes.plot(panel.places, panel.ideal, color=INK, linestyle=(0, (5, 2)), linewidth=1)
    ends = {"number of devices": float(panel.devices[-1]), "whole layers, nobody waits": panel.ideal[-1]}
    inks = dict.fromkeys(ends, PALE)
    for schedule, values in panel.speedups.items():
        points = [(place, v) for place, v in zip(panel.places, values, strict=True) if v is not None]
        if not points:
            continue
        colour = colour_of(schedule)
        width = 2.6 if schedule == DEFAULT else 1.7
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, marker="o", markersize=4.5)
        label = f"{schedule} {points[-1][1]:.1f}"
        ends[label], inks[label] = points[-1][1], colour
    for label, height in _spread(ends, 0.052 * top).items():
        axes.annotate(
            label,
            (panel.places[-1], height),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=inks[label],
            fontsize=9,
            annotation_clip=False,
        )


def _device_axis(axes: Axes, panel: Panel) -> None:
    """Numbers of devices, from none."""
    axes.set_xlabel("devices", fontsize=9)
    axes.set_xticks(panel.devices)
    axes.set_xlim(0, max(panel.devices) * 1.02)


def _link_axis(axes: Axes, panel: Panel) -> None:
    """Speeds of links, each twice as wide as the one before, with those that have a name."""
    slowest, fastest = min(panel.places), max(panel.places)
    axes.set_xscale("log", base=2)
    axes.set_xlim(slowest / 1.15, fastest * 1.06)
    axes.set_xlabel("GB/s between two devices", fontsize=9)
    axes.set_xticks(panel.places, [f"{place:g}" for place in panel.places])
    axes.minorticks_off()
    for name, speed, side in KNOWN_LINKS:
        if slowest <= speed <= fastest:
            axes.axvline(speed, color="#d5d5da", linewidth=0.9, zorder=0)
            axes.annotate(
                name,
                (speed, 1.0),
                (0, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right" if speed > fastest / 1.6 else side,  # else it is over the curves' names
                va="bottom",
                fontsize=7.5,
                color=PALE,
            )


def _spread(heights: Mapping[str, float], least: float) -> dict[str, float]:
    """Moves labels that would overlap apart, upwards from the lowest."""
    placed: dict[str, float] = {}
    below = float("-inf")
    for label, height in sorted(heights.items(), key=lambda item: item[1]):
        below = placed[label] = max(height, below + least)
    return placed
