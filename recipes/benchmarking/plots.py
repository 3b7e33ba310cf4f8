"""The pictures: bars of the speed-ups, and curves of the validation loss against time."""

from __future__ import annotations

from pathlib import Path

from labels import in_lines
from matplotlib.figure import Figure

from .contenders import Contender
from .report import Run, Spread, failure, ratios, runs_of

OURS, PEERS, BASE = "#d1495b", "#00798c", "#8d99ae"


def _color(contender: Contender) -> str:
    return OURS if contender.is_ours else PEERS if contender.kind.startswith("torch-") else BASE


def draw_speedups(contenders: list[Contender], results: list[list[Run]], num_devices: int, path: Path) -> None:
    """Bars of the median speed-up over naive, with lines from the least to the greatest repetition."""
    figure = Figure(figsize=(8, 1.2 + 0.36 * len(contenders)), layout="constrained")
    axes = figure.subplots()
    farthest = float(num_devices)
    for row, contender in enumerate(contenders):
        spread = Spread.of(ratios(contender, results, lambda run: run["tokens_per_second"]))
        if failure(contender, results) or spread is None:
            reason = "failed" if failure(contender, results) else "no naive run to compare with"
            axes.text(0.03, row, reason, va="center", color="0.4")
            continue
        error = [[spread.median - spread.least], [spread.greatest - spread.median]]
        axes.barh(row, spread.median, color=_color(contender), xerr=error, error_kw={"ecolor": "0.25", "capsize": 3})
        farthest = max(farthest, spread.greatest)
        over_line = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        axes.text(spread.greatest + 0.03, row, f"{spread.median:.2f}", va="center", fontsize=9, bbox=over_line)
    axes.axvline(num_devices, color="0.3", linestyle="--", linewidth=1)
    axes.text(num_devices - 0.02, -0.7, f"ideal: {num_devices}", ha="right", va="center", fontsize=9, color="0.3")
    axes.set_yticks(range(len(contenders)), [in_lines(contender.label) for contender in contenders])
    axes.set_ylim(len(contenders) - 0.4, -1.2)
    axes.set_xlim(0, farthest * 1.12)
    axes.set_xlabel("speed-up over naive model parallelism (median, least - greatest)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_losses(contenders: list[Contender], results: list[list[Run]], path: Path) -> None:
    """Validation loss against seconds of training, a line per repetition, and the targets."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, contender in enumerate(contenders):
        if failure(contender, results):
            continue
        for repetition, run in enumerate(runs_of(contender, results)):
            _, seconds, losses = zip(*run["evaluations"], strict=True)
            label = in_lines(contender.label) if repetition == 0 else None
            axes.plot(seconds, losses, color=f"C{number}", marker=".", markersize=4, linewidth=1.2, label=label)
    targets = sorted({run["target"] for repetition in results for run in repetition if "target" in run})
    for target in targets:
        axes.axhline(target, color="0.3", linestyle="--", linewidth=0.8)
    if targets:
        axes.text(1.0, targets[0], "target ", transform=axes.get_yaxis_transform(), ha="right", va="top", color="0.3")
    axes.set_xlabel("seconds of training, without evaluations")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
