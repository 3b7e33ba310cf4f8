"""What the runs say: tables in Markdown, and whether all who should compute the same numbers did."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .contenders import Contender

TOLERANCE = 1e-4
"""Relative difference of losses that counts as equal. Another order of summation moves them by 1e-7 in a run of 16
updates; a tied matrix whose gradients are not summed, or a gradient that is not clipped, by 4e-4 after 8."""

Run = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some repetitions."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None of no values."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values)) if values else None

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} - {self.greatest:.2f})"


def runs_of(contender: Contender, results: list[list[Run]]) -> list[Run]:
    """The runs of a contender, one per repetition."""
    return [run for repetition in results for run in repetition if run["contender"] == contender.label]


def failure(contender: Contender, results: list[list[Run]]) -> str | None:
    """Why a contender failed, if it did."""
    return next((run["failed"] for run in runs_of(contender, results) if "failed" in run), None)


def ratios(contender: Contender, results: list[list[Run]], measure: Callable[[Run], float | None]) -> list[float]:
    """A measure of a contender over that of the naive run, in every repetition that has both."""
    found = []
    for repetition in results:
        named = {run["contender"]: run for run in repetition if "failed" not in run}
        if contender.label in named and "naive" in named:
            own, base = measure(named[contender.label]), measure(named["naive"])
            if own is not None and base is not None:
                found.append(own / base)
    return found


def disagreements(contenders: list[Contender], results: list[list[Run]]) -> dict[str, float]:
    """Synchronous contenders whose losses are not the naive run's, with the greatest relative difference.

    Compared are the mean training loss, the loss of every update where there is one, and the validation loss at the end.
    """
    found = {}
    for contender in contenders:
        difference = loss_difference(contender, results)
        if contender.is_synchronous and difference is not None and not difference <= TOLERANCE:
            found[contender.label] = difference
    return found


def loss_difference(contender: Contender, results: list[list[Run]]) -> float | None:
    """Greatest relative difference between a contender's losses and those of the naive run; None without any."""
    differences = []
    for repetition in results:
        named = {run["contender"]: run for run in repetition if "failed" not in run}
        if contender.label in named and "naive" in named:
            own, base = named[contender.label], named["naive"]
            pairs = [(own[key], base[key]) for key in ("training_loss", "eval_loss") if key in own and key in base]
            pairs += zip(own.get("losses", []), base["losses"], strict=False)
            differences += [abs(a - b) / abs(b) for a, b in pairs]
    return max(differences, default=None)


def _failed_row(contender: Contender, message: str, columns: int) -> str:
    """A row of a table with so many columns for a contender without figures."""
    shown = " ".join(message.split()).replace("|", "\\|")[:200]
    return f"| {contender.label} | {contender.micro_batches} | failed: {shown} |" + "  |" * (columns - 3)


def throughput_table(contenders: list[Contender], results: list[list[Run]], num_devices: int) -> str:
    """Markdown table: medians over the repetitions, ratios within each repetition."""
    lines = [
        "| contender | M | tokens/s | speed-up over naive (min - max) | share of ideal | devices busy "
        "| kernels slower side by side | peak MiB per process | growth in MiB, second half | validation loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    wrong = disagreements(contenders, results)
    for contender in contenders:
        if message := failure(contender, results):
            lines.append(_failed_row(contender, message, 10))
            continue
        runs = runs_of(contender, results)
        speedups = ratios(contender, results, lambda run: run["tokens_per_second"])
        share, slower, busy = "-", "-", "-"
        if speedups and contender.kind != "naive":
            share = f"{statistics.median(speedups) / num_devices:.0%}"
        if all("busy_shares" in run for run in runs):
            columns = zip(*(run["busy_shares"] for run in runs), strict=True)
            busy = ", ".join(f"{statistics.median(column):.0%}" for column in columns)
            if len(speedups) == len(runs):
                # speed-up = (sum of busy shares) / (time of a kernel beside the others / time of a kernel alone)
                excess = [sum(run["busy_shares"]) / ratio - 1 for run, ratio in zip(runs, speedups, strict=True)]
                slower = f"{statistics.median(excess):+.1%}"
        peaks = zip(*(run["peak_memory_mib"] for run in runs), strict=True)
        growths = zip(*(run["memory_growth_mib"] for run in runs), strict=True)
        note = f" **losses differ from naive by {wrong[contender.label]:.1e}**" if contender.label in wrong else ""
        cells = [
            contender.label,
            str(contender.micro_batches),
            f"{statistics.median(run['tokens_per_second'] for run in runs):,.0f}",
            str(Spread.of(speedups) or "-"),
            share,
            busy,
            slower,
            ", ".join(f"{max(peak):,.0f}" for peak in peaks),
            ", ".join(f"{statistics.median(growth):+.1f}" for growth in growths),
            f"{statistics.median(run['eval_loss'] for run in runs):.4f}{note}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds_to_target(run: Run) -> float | None:
    """Seconds until a run crossed its target; None if it did not."""
    return crossing(run)[0] if crossing(run) else None


def tokens_to_target(run: Run) -> float | None:
    """Tokens until a run crossed its target; None if it did not."""
    return crossing(run)[1] * run["tokens_per_update"] if crossing(run) else None


def crossing(run: Run) -> tuple[float, float] | None:
    """Seconds and updates when the validation loss first crossed the target, on a straight line between evaluations."""
    before = None
    for update, seconds, loss in run["evaluations"]:
        if loss <= run["target"]:
            if before is None:
                return seconds, update
            part = (before[2] - run["target"]) / (before[2] - loss)
            return before[1] + part * (seconds - before[1]), before[0] + part * (update - before[0])
        before = update, seconds, loss
    return None


def time_to_loss_table(contenders: list[Contender], results: list[list[Run]]) -> str:
    """Markdown table: seconds and tokens to the target, and both relative to the naive run of the same repetition."""
    lines = [
        "| contender | M | target reached | seconds | time / naive (min - max) | tokens | tokens / naive (min - max) "
        "| tokens/s | last validation loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for contender in contenders:
        if message := failure(contender, results):
            lines.append(_failed_row(contender, message, 9))
            continue
        runs = runs_of(contender, results)
        reached = [run for run in runs if crossing(run)]
        cells = [contender.label, str(contender.micro_batches), f"{len(reached)} of {len(runs)}"]
        for measure, form in ((seconds_to_target, "{:,.1f}"), (tokens_to_target, "{:,.0f}")):
            cells.append(form.format(statistics.median(map(measure, reached))) if reached else "-")
            cells.append(str(Spread.of(ratios(contender, results, measure)) or "-"))
        cells.append(f"{statistics.median(run['tokens_per_second'] for run in runs):,.0f}")
        cells.append(f"{statistics.median(run['evaluations'][-1][2] for run in runs):.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
