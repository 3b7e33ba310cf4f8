"""Speed-up against the number of devices, one curve per schedule, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..schedules import DEFAULT, SCHEDULES
from .peers import PEERS

INK = "#1c1c22"
PLOT, LABELS = 5.6, 2.3  # inches: width of a diagram and of the labels at its right


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Args:
        title: above it.
        devices: numbers of devices, ascending.
        ideal: speed-up of the split at each of them if no device ever waited.
        speedups: {schedule: speed-up at each of them; None where it can't run}.
    """

    title: str
    devices: Sequence[int]
    ideal: Sequence[float]
    speedups: Mapping[str, Sequence[float | None]]


def colour_of(schedule: str) -> str:
    """The colour of a schedule's curve."""
    return SCHEDULES[schedule].colour if schedule in SCHEDULES else PEERS.get(schedule, INK)


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
        axes.plot(panel.devices, panel.devices, color="#b5b5bc", linestyle=(0, (2, 2)), linewidth=1)
        axes.plot(panel.devices, panel.ideal, color=INK, linestyle=(0, (5, 2)), linewidth=1)
        ends = {"number of devices": float(panel.devices[-1]), "whole layers, nobody waits": panel.ideal[-1]}
        inks = dict.fromkeys(ends, "#77777f")
        for schedule, values in panel.speedups.items():
            points = [(d, v) for d, v in zip(panel.devices, values, strict=True) if v is not None]
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
                (panel.devices[-1], height),
                (8, 0),
                textcoords="offset points",
                va="center",
                color=inks[label],
                fontsize=9,
                annotation_clip=False,
            )
        axes.set_title(panel.title, fontsize=10, loc="left", color=INK)
        axes.set_xlabel("devices", fontsize=9)
        axes.set_ylabel("speed-up over one device", fontsize=9)
        axes.set_xticks(panel.devices)
        axes.set_xlim(0, max(panel.devices) * 1.02)
        axes.set_ylim(0, top * 1.04)
        axes.grid(axis="y", color="#ececef", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path(path)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _spread(heights: Mapping[str, float], least: float) -> dict[str, float]:
    """Moves labels that would overlap apart, upwards from the lowest."""
    placed: dict[str, float] = {}
    below = float("-inf")
    for label, height in sorted(heights.items(), key=lambda item: item[1]):
        below = placed[label] = max(height, below + least)
    return placed
