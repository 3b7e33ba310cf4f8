"""`hf-ouroboros simulate`: speed-up against the number of devices or the speed of links, for schedules and M."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DeviceMapError, UnsupportedOptionError
from ..options import Place, Whole
from ..simulate.sharded import FSDP
from ..simulate.simulator import ours
from ..user_files import check_writable, written_together
from .options import (
    GIGABYTES,
    add_link_options,
    add_model_options,
    check_work,
    data_type,
    links,
    load_config,
    schedules,
)
from .tables import table

if TYPE_CHECKING:
    from ..planning.hardware import DeviceKind
    from ..planning.unit_facts import ModelFacts
    from ..simulate.curves import Panel
    from ..simulate.simulator import Simulation

MOST_PANELS = 24
DEVICES, LINKS = "devices", "links"
COUNTS = {DEVICES: [2, 4, 8, 16], LINKS: [8]}
SPEEDS = {DEVICES: [25.0], LINKS: [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]}
HEADER = (
    *("schedule", "devices", "M", "GB/s", "speed-up", "of its split", "of the devices"),
    *("fill ms", "ticks in flight", "tokens/s"),
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to those of `hf-ouroboros`."""
    parser = commands.add_parser(
        "simulate",
        help="speed-up against the number of devices or the speed of links: schedules and micro-batches compared",
        description="Simulates the engine's own programs, and those of other software, with each split at its best.",
    )
    add_model_options(parser)
    parser.add_argument("--kind", default="rtx3090", help="kind of the devices, as for `plan --devices`")
    parser.add_argument(
        "--against",
        choices=[DEVICES, LINKS],
        default=DEVICES,
        help="what the speed-up is drawn against: the number of devices (default), or the speed of their links",
    )
    parser.add_argument(
        "--counts",
        nargs="+",
        type=Whole(1, 128),
        default=None,
        help="numbers of devices (default 2 4 8 16); against links one panel for each (default 8)",
    )
    parser.add_argument("--micro_batches", nargs="+", type=Whole(1, 2**16), default=[8], help="M, one panel for each")
    parser.add_argument(
        "--link",
        nargs="+",
        type=GIGABYTES,
        default=None,
        help="GB/s, one panel for each (default 25); against links the points of all panels (default 0.125, which is "
        "Ethernet of 1 Gbit/s, to 32, which is PCIe 4.0 x16)",
    )
    add_link_options(parser)
    parser.add_argument(
        "--schedules",
        nargs="+",
        choices=schedules(),
        default=None,
        metavar="SCHEDULE",
        help=f"of {', '.join(schedules())} (default {', '.join(ours())}; against links also {FSDP})",
    )
    parser.add_argument("--output", type=Place((".png",)), default="speedup.png", help="the plot (default speedup.png)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Sweeps; returns the exit status."""
    from ..planning.unit_facts import model_facts
    from ..simulate.curves import draw_speedups

    output = Path(arguments.output)
    check_writable("--output", output)
    kind = _kind(arguments)
    counts = sorted(set(arguments.counts or COUNTS[arguments.against]))
    speeds = list(dict.fromkeys(arguments.link or SPEEDS[arguments.against]))
    chosen = arguments.schedules or [*ours(), *([FSDP] if arguments.against == LINKS else [])]
    per_panel = counts if arguments.against == LINKS else speeds
    if len(arguments.micro_batches) * len(per_panel) > MOST_PANELS:
        raise UnsupportedOptionError(
            f"--micro_batches and {'--counts' if arguments.against == LINKS else '--link'} make more than {MOST_PANELS} "
            "panels; give fewer of them"
        )
    config = load_config(arguments)
    facts = model_facts(config, arguments.batch, arguments.seq, data_type(arguments, config))
    times = len(speeds) * len(chosen)
    check_work(facts.layers, [(count, m) for count in counts for m in arguments.micro_batches for _ in range(times)])
    sweep = _Sweep(arguments, facts, kind, counts, speeds, chosen)
    panels = list(sweep.panels())
    print(
        f"{facts.name}: {facts.parameters:,} parameters, {facts.layers} layers; micro-batches of {facts.batch} x "
        f"{facts.time} tokens; {kind.name} by data sheet\n"
    )
    print(table(HEADER, sweep.rows))
    for reason in sweep.left_out:
        print(f"not simulated: {reason}")
    heading = f"{facts.name}, {facts.parameters / 1e9:.1f} billion parameters on {kind.name}s, simulated"
    with written_together(output) as (new,):
        draw_speedups(panels, new, title=heading)
    print(f"\nplot: {output}")
    return 0


def _kind(arguments: argparse.Namespace) -> DeviceKind:
    """The one kind of device that all are of."""
    from ..planning.hardware import parse_devices

    try:
        kinds = parse_devices([arguments.kind])
    except DeviceMapError as error:
        raise UnsupportedOptionError(str(error).replace("--devices", "--kind", 1)) from error
    if len(kinds) != 1 or isinstance(kinds[0], str):
        raise UnsupportedOptionError(f"--kind {arguments.kind!r} must be one kind of device by data sheet, as rtx3090")
    return kinds[0]


class _Sweep:
    """All simulations, as panels and as rows of a table.

    Args:
        arguments: of the command.
        facts: the model and its micro-batches.
        kind: of the devices.
        counts: numbers of devices, ascending.
        speeds: of links, GB/s.
        chosen: schedules.

    Attributes:
        rows: of the table, as `HEADER` says.
        left_out: what could not be simulated, and why.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        facts: ModelFacts,
        kind: DeviceKind,
        counts: list[int],
        speeds: list[float],
        chosen: list[str],
    ):
        self.arguments, self.facts, self.kind, self.chosen = arguments, facts, kind, chosen
        self.counts, self.speeds = counts, speeds
        self.rows: list[tuple[object, ...]] = []
        self.left_out: dict[str, None] = {}

    def panels(self) -> Iterator[Panel]:
        """One after the other, while rows are added."""
        from dataclasses import replace

        from ..planning.memory_model import MemoryOptions
        from ..planning.planner import estimated, plan_split
        from ..simulate.curves import Panel
        from .prediction import ideal, predict

        # Whether it fits is the planner's question; here only time counts.
        device = replace(estimated(self.facts, self.kind), memory=float("inf"))
        for m in self.arguments.micro_batches:
            options = MemoryOptions(micro_batches=m, recompute=self.arguments.recompute, weights=self.arguments.weights)
            plans = {count: plan_split(self.facts, [device] * count, options) for count in self.counts}
            ideals = {count: ideal(plan) for count, plan in plans.items()}
            for title, points, speeds in self._points(m):
                curves: dict[str, list[float | None]] = {}
                for schedule in self.chosen:
                    curves[schedule] = []
                    for count, speed in points:
                        try:
                            found = predict(plans[count], schedule, links(self.arguments, speed))
                        except ValueError as error:  # more stages than layers, or an M that it can't do
                            self.left_out[f"{schedule} on {count} devices with M = {m}, {error}"] = None
                            curves[schedule].append(None)
                            continue
                        curves[schedule].append(found.speedup)
                        self._add_row(found, count, m, speed, ideals[count])
                yield Panel(
                    title, [count for count, _ in points], [ideals[count] for count, _ in points], curves, speeds
                )

    def _points(self, m: int) -> Iterator[tuple[str, list[tuple[int, float]], list[float] | None]]:
        """The panels of an M: title, (devices, GB/s) of all points, and their places on an axis of links."""
        if self.arguments.against == LINKS:
            speeds = sorted(self.speeds)
            for count in self.counts:
                yield f"{count} devices, M = {m}", [(count, speed) for speed in speeds], speeds
        else:
            for speed in self.speeds:
                yield f"M = {m}, links of {speed:g} GB/s", [(count, speed) for count in self.counts], None

    def _add_row(self, found: Simulation, count: int, m: int, speed: float, best: float) -> None:
        tokens = self.facts.batch * self.facts.time
        self.rows.append(
            (
                found.schedule,
                count,
                m,
                f"{speed:g}",
                f"{found.speedup:.2f}",
                f"{found.speedup / best:.1%}" if found.schedule in ours() else "",
                f"{found.speedup / count:.1%}",
                f"{found.fill_seconds * 1e3:.1f}",
                max(found.ticks_in_flight),
                f"{tokens / found.seconds_per_tick:,.0f}",
            )
        )
