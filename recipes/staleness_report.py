"""Tables of the staleness study: final losses, and tokens to reach the synchronous run's loss."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from staleness_picture import Panel, draw

# What a row of the table is about; the learning rate is chosen, seeds are averaged, everything else is the family.
_ROW = (
    "stages",
    "micro_batches",
    "compensation",
    "compensation_args",
    "delay_warmup_updates",
    "optim",
    "optim_args",
    "weights",
)
_FREE = (*_ROW, "learning_rate", "seed", "updates", "adam_beta1", "adam_beta2", "weight_decay")
_OPTIMIZERS = ("nesterov", "muon", "basis_rotation")
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Run = Mapping[str, Any]
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval; no width for a single value."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's t interval."""
        mean = statistics.fmean(values)
        if len(values) == 1 or not all(map(math.isfinite, values)):
            return cls(mean, None, len(values))
        quantile = _T[min(len(values) - 1, max(_T))]
        return cls(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)), len(values))

    def text(self, form: str = ".3f", unit: str = "") -> str:
        """As it stands in a table."""
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:{form}}{unit}" + ("" if self.half is None else f" ± {self.half:{form.lstrip('+')}}")


@dataclass
class Row:
    """All runs of one combination of K, M and compensation.

    Args:
        key: values of `_ROW`.
        test: {updates: {seed: bits per byte on test text at the best learning rate}}.
        rates: {updates: learning rate that is best on validation text; "(edge)" if it is the largest or smallest of those
            tried, so that a better one may lie beyond}.
    """

    key: Key
    test: dict[int, dict[int, float]]
    rates: dict[int, str]

    def __getattr__(self, name: str) -> Any:
        if name not in _ROW:
            raise AttributeError(name)
        return self.key[_ROW.index(name)]

    @property
    def delay(self) -> float:
        """Of the first stage, in updates."""
        return (self.stages - 1) / self.micro_batches

    @property
    def optimizer(self) -> Key:
        """What a synchronous run has to share to be compared with."""
        own = next((name for name in _OPTIMIZERS if name in self.compensation.split("+")), "none")
        return own, self.optim, self.optim_args

    @property
    def label(self) -> str:
        """Compensation, with everything that is not as usual."""
        extra = [f"({self.compensation_args})"] if self.compensation_args else []
        extra += [f"delay warm-up {self.delay_warmup_updates}"] if self.delay_warmup_updates else []
        extra += [f"{self.optim} {self.optim_args}".strip()] if self.optim != "adamw_torch" else []
        extra += [f"weights {self.weights}"] if self.weights != "then" else []
        return " ".join([self.compensation, *extra])


def read_runs(folder: Path) -> list[Run]:
    """All results in a folder, also those of before there was a choice of weights."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("K*.json"))]
    return [{**run, "setting": {"weights": "then", **run["setting"]}} for run in runs]


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """Runs by combination; of each length the hyper-parameters that are best on the seeds that all of them have."""
    found: dict[Key, dict[int, dict[Key, dict[int, Run]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    tuned = [name for name in _FREE if name not in (*_ROW, "seed", "updates")]
    for run in runs:
        setting = run["setting"]
        values = tuple(setting[name] for name in tuned)
        found[tuple(setting[n] for n in _ROW)][setting["updates"]][values][setting["seed"]] = run
    rows = []
    for key, lengths in found.items():
        test, rates = {}, {}
        for updates, tried in lengths.items():
            common = set.intersection(*(set(seeds) for seeds in tried.values())) or set()

            def score(values: Key, tried: dict = tried, common: set = common) -> float:
                seeds = common or set(tried[values])
                return statistics.fmean(_number(tried[values][s]["validation"]) for s in seeds)

            best = min(tried, key=score)
            test[updates] = {seed: _number(run["test"]) for seed, run in tried[best].items()}
            tried_rates = sorted({values[tuned.index("learning_rate")] for values in tried})
            rate = best[tuned.index("learning_rate")]
            edge = len(tried_rates) > 1 and rate in (tried_rates[0], tried_rates[-1])
            rates[updates] = f"{rate:g}" + " (edge)" * edge
        rows.append(Row(key, test, rates))
    return sorted(rows, key=lambda row: (row.optimizer, row.stages, -row.micro_batches, row.label))


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def tokens_to_reach(lengths: Mapping[int, float], target: float, nominal: int) -> tuple[float, str]:
    """How long a run has to be to end at a loss, relative to the nominal length.

    Args:
        lengths: {updates: final loss}; each is a run of its own, whose learning rate goes to 0.
        target: the loss to reach.
        nominal: updates of the synchronous run.

    Returns:
        The ratio, linear in the logarithm of the length between runs, and "" or, where the runs don't enclose the target,
        "<" or ">" that ratio.
    """
    points = sorted(lengths.items())
    if points[0][1] <= target:
        return points[0][0] / nominal, "" if points[0][1] == target else "<"
    for (shorter, above), (longer, below) in zip(points, points[1:], strict=False):
        if below <= target:
            share = 1.0 if math.isinf(above) else (above - target) / (above - below)
            return math.exp(math.log(shorter) + share * math.log(longer / shorter)) / nominal, ""
    return points[-1][0] / nominal, ">"


def token_ratio(row: Row, baseline: Row, nominal: int, seed: int) -> tuple[float, str]:
    """Tokens to a loss, over those of the synchronous run to the same loss, with the same seed.

    Where the row has runs of several lengths, it is the loss of the synchronous run of the nominal length; where it has
    one length, it is its own final loss, and synchronous runs of several lengths tell when they would have been there.

    Returns:
        The ratio, and "" or, where the runs don't enclose it, "<" or ">" that ratio.
    """
    if len(row.test) > 1:
        lengths = {updates: losses[seed] for updates, losses in row.test.items() if seed in losses}
        return tokens_to_reach(lengths, baseline.test[nominal][seed], nominal)
    lengths = {updates: losses[seed] for updates, losses in baseline.test.items() if seed in losses}
    share, bound = tokens_to_reach(lengths, row.test[nominal][seed], nominal)
    return 1 / share, bound.translate(str.maketrans("<>", "><"))


def ratio_text(row: Row, baseline: Row, nominal: int) -> tuple[str, Interval | None]:
    """Tokens to reach the synchronous loss, over the seeds that both have; a bound where it was not enclosed."""
    seeds = sorted(row.test[nominal].keys() & baseline.test[nominal].keys())
    if not all(math.isfinite(baseline.test[nominal][seed]) for seed in seeds):
        return "-", None
    found = [token_ratio(row, baseline, nominal, seed) for seed in seeds]
    if not found:
        return "-", None
    bounds = {bound for _, bound in found}
    if bounds == {""}:
        interval = Interval.of([ratio for ratio, _ in found])
        return interval.text(".2f"), interval
    if bounds == {"<"} or bounds == {">"}:
        return f"{bounds.pop()} {found[0][0]:.2f}", None
    return " / ".join(f"{bound}{ratio:.2f}" for ratio, bound in found), None


def costs(row: Row, baseline: Row, updates: int) -> Interval | None:
    """Relative loss against a synchronous run of the same length, in per cent, seed by seed."""
    if updates not in row.test or updates not in baseline.test:
        return None
    mine, theirs = row.test[updates], baseline.test[updates]
    seeds = sorted(mine.keys() & theirs.keys())
    return Interval.of([100 * (mine[s] / theirs[s] - 1) for s in seeds]) if seeds else None


def synchronous_rows(rows: Iterable[Row], nominal: int) -> dict[Key, Row]:
    """Each optimizer's synchronous runs, where there are runs of that many updates."""
    return {row.optimizer: row for row in rows if row.stages == 1 and nominal in row.test}


def table(rows: Sequence[Row], nominal: int) -> list[str]:
    """Markdown: every combination against the synchronous runs of its own optimizer and of AdamW."""
    synchronous = synchronous_rows(rows, nominal)
    adamw = synchronous.get(("none", "adamw_torch", ""))
    lines = [
        "| compensation | K | M | learning rate | seeds | test bits per byte | against its synchronous run | against "
        "synchronous AdamW | tokens to its synchronous loss | tokens to synchronous AdamW's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if nominal in row.test):
        own = synchronous.get(row.optimizer)
        losses = Interval.of(list(row.test[nominal].values()))
        cells = [row.label, row.stages, row.micro_batches, row.rates[nominal], losses.count, losses.text()]
        for baseline in (own, adamw):
            cost = None if baseline in (None, row) else costs(row, baseline, nominal)
            cells.append("-" if cost is None else cost.text("+.1f", " %"))
        for baseline in (own, adamw):
            cells.append("-" if baseline in (None, row) else ratio_text(row, baseline, nominal)[0])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def panels(rows: Sequence[Row], nominal: int) -> list[Panel]:
    """What there is to draw of runs of a length: their cost, and the tokens to the synchronous loss."""
    synchronous = synchronous_rows(rows, nominal)
    cost: dict[str, dict[tuple[float, int], Interval]] = defaultdict(dict)
    ratio: dict[str, dict[tuple[float, int], Interval]] = defaultdict(dict)
    for row in rows:
        baseline = synchronous.get(row.optimizer)
        if row.stages == 1 or baseline is None or nominal not in row.test:
            continue
        intervals = costs(row, baseline, nominal), ratio_text(row, baseline, nominal)[1]
        for values, interval in zip((cost, ratio), intervals, strict=True):
            if interval is not None and math.isfinite(interval.mean):
                values[row.label][row.delay, row.stages] = interval
    drawn = [
        Panel("final loss over the synchronous run's (%)", 0.0, cost),
        Panel("tokens to its loss (ratio)", 1.0, ratio),
    ]
    return [panel for panel in drawn if panel.points]


def write_report(folder: Path) -> str:
    """Writes `report.md` and a picture per family of runs into the folder; returns the report."""
    families: dict[tuple, list[Run]] = defaultdict(list)
    for run in read_runs(folder):
        fixed = {name: value for name, value in run["setting"].items() if name not in _FREE}
        families[run["data"], tuple(sorted(fixed.items()))].append(run)
    lines = ["# Staleness study", ""]
    for number, ((data, fixed), runs) in enumerate(sorted(families.items(), key=str), 1):
        described = ", ".join(f"{name}={value}" for name, value in fixed if value != "")
        rows = rows_of(runs)
        lengths = {updates for row in rows if row.stages == 1 for updates in row.test}
        lines += [f"## {number}. {data}", "", described, f"{len(runs)} runs.", ""]
        if not lengths:
            lines += ["No synchronous run (stages: 1) to compare with yet.", ""]
            lengths = {updates for row in rows for updates in row.test}
        # Of the synchronous runs' lengths, that of most other runs; shorter ones tell how many tokens a loss is worth.
        nominal = max(lengths, key=lambda updates: (sum(updates in row.test for row in rows), updates))
        per_update = runs[0]["tokens_per_update"]
        lines += [
            f"{nominal} updates of {per_update} tokens; ± are 95 % intervals over seeds.",
            "",
            *table(rows, nominal),
        ]
        picture = folder / f"cost-{number}.png"
        if drawn := panels(rows, nominal):
            draw(drawn, picture, f"{data}: {nominal} updates of {per_update} tokens")
            lines += ["", f"![Cost by delay]({picture.name})"]
        lines.append("")
    text = "\n".join(lines)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    return text
