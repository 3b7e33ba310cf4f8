"""The picture of the staleness study: what a delay costs, one line per compensation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from labels import in_lines

if TYPE_CHECKING:
    from staleness_report import Interval

_SPREAD = 0.3  # of the distance between two delays: what stands at one delay lies this far to its left and right
_CHARACTERS = 14  # of the legend's letters in an inch


@dataclass(frozen=True)
class Panel:
    """One quantity by delay.

    Args:
        name: the quantity and its unit.
        level: its value without delay, drawn as a line.
        points: {label: {(delay of the first stage in updates, K): value}}.
    """

    name: str
    level: float
    points: Mapping[str, Mapping[tuple[float, int], Interval]]


def draw(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Panels side by side, with one legend below them.

    Delays stand at equal distances, in their order, and at each of them compensations and K side by side, so that
    intervals can be told apart.
    """
    from matplotlib.figure import Figure

    labels = sorted({label for panel in panels for label in panel.points})
    keys = {key for panel in panels for points in panel.points.values() for key in points}
    delays, all_stages = (sorted({key[part] for key in keys}) for part in range(2))
    slots = [(label, stages) for label in labels for stages in all_stages]

    def place(label: str, delay: float, stages: int) -> float:
        slot = slots.index((label, stages)) + 0.5
        return delays.index(delay) + _SPREAD * (2 * slot / len(slots) - 1)

    written = {label: in_lines(label, 44) for label in labels}
    width = 1 + 5 * len(panels)
    longest = max(len(line) for text in written.values() for line in text.splitlines())
    columns = min(len(labels), max(1, _CHARACTERS * width // (longest + 8)))
    lines = sum(text.count("\n") + 1 for text in written.values())
    figure = Figure(figsize=(width, 4 + 0.18 * lines / columns), layout="constrained")
    figure.suptitle(title + (f", K={all_stages[0]}" if len(all_stages) == 1 else ""), fontsize=10)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, label in enumerate(labels):
            points = sorted(panel.points.get(label, {}).items())
            places = [place(label, delay, stages) for (delay, stages), _ in points]
            means = [interval.mean for _, interval in points]
            halves = [interval.half or 0.0 for _, interval in points]
            style = {
                "color": f"C{i % 10}",
                "linestyle": "-" if i < 10 else "--",
                "linewidth": 1,
                "label": written[label],
            }
            axes.errorbar(places, means, halves, marker="o", markersize=4, capsize=2, **style)
            for x, y, ((_, stages), _) in zip(places, means, points, strict=True) if len(all_stages) > 1 else ():
                axes.annotate(f"K{stages}", (x, y), xytext=(3, 3), textcoords="offset points", fontsize=6)
        axes.axhline(panel.level, color="black", linewidth=0.8)
        axes.set_xticks(range(len(delays)), [f"{delay:.3g}" for delay in delays])
        axes.set(xlim=(-0.5, len(delays) - 0.5), xlabel="delay of the first stage (K-1)/M, updates", ylabel=panel.name)
        axes.grid(alpha=0.3, axis="y")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize=8)
    figure.savefig(path, dpi=150)
