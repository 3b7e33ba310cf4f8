"""`hf-ouroboros simulate`: speed-up against the number of devices, for schedules, M and link speeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_link_options, add_model_options, data_type, links, load_config, positive
from .tables import table

SCHEDULES = ("pipelined", "lockstep", "1f1b", "zero-bubble", "interleaved", "gpipe", "naive")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to those of `hf-ouroboros`."""
    parser = commands.add_parser(
        "simulate",
        help="speed-up against the number of devices: schedules, micro-batches and links compared",
        description="Simulates the engine's own programs, and those of other software, with each split at its best.",
    )
    add_model_options(parser)
    parser.add_argument("--kind", default="rtx3090", help="kind of the devices, as for `plan --devices`")
    parser.add_argument("--counts", nargs="+", type=positive, default=[2, 4, 8, 16], help="numbers of devices")
    parser.add_argument("--micro_batches", nargs="+", type=positive, default=[8], help="M, one panel for each")
    parser.add_argument("--link", nargs="+", type=float, default=[25.0], help="GB/s, one panel for each (default 25)")
    add_link_options(parser)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES[:4]), metavar="SCHEDULE")
    parser.add_argument("--output", default="speedup.png", help="the plot (default speedup.png)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Sweeps; returns the exit status."""
    from dataclasses import replace

    from ..errors import UnsupportedOptionError
    from ..partition.facts import model_facts
    from ..partition.hardware import parse_devices
    from ..partition.memory_model import MemoryOptions
    from ..partition.planner import estimated, plan_split
    from ..simulate.curves import Panel, draw_speedups
    from .prediction import ideal, predict

    config = load_config(arguments)
    facts = model_facts(config, arguments.batch, arguments.seq, data_type(arguments, config))
    kinds = parse_devices([arguments.kind])
    if len(kinds) != 1 or isinstance(kinds[0], str):
        raise UnsupportedOptionError(f"--kind {arguments.kind!r} must be one kind of device by data sheet, as rtx3090")
    # Whether it fits is the planner's question; here only time counts.
    device = replace(estimated(facts, kinds[0]), memory=float("inf"))
    rows, panels = [], []
    counts = sorted(set(arguments.counts))
    for micro_batches in arguments.micro_batches:
        options = MemoryOptions(micro_batches=micro_batches, recompute=arguments.recompute)
        for gigabytes in arguments.link:
            plans = [plan_split(facts, [device] * count, options) for count in counts]
            ideals = [ideal(plan) for plan in plans]
            curves: dict[str, list[float | None]] = {}
            for schedule in arguments.schedules:
                curves[schedule] = []
                for plan, count, best in zip(plans, counts, ideals, strict=True):
                    try:
                        found = predict(plan, schedule, links(arguments, gigabytes))
                    except ValueError:  # more stages than layers, or an M that its rounds can't divide
                        curves[schedule].append(None)
                        continue
                    curves[schedule].append(found.speedup)
                    rows.append(
                        (
                            schedule,
                            count,
                            micro_batches,
                            f"{gigabytes:g}",
                            f"{found.speedup:.2f}",
                            f"{found.speedup / best:.1%}" if schedule in ("pipelined", "lockstep", "1f1b") else "",
                            f"{found.speedup / count:.1%}",
                            f"{found.fill_seconds * 1e3:.1f}",
                            max(found.ticks_in_flight),
                        )
                    )
            title = f"M = {micro_batches}, links of {gigabytes:g} GB/s"
            panels.append(Panel(title, counts, ideals, curves))
    header = (
        "schedule", "devices", "M", "GB/s", "speed-up", "of its split", "of the devices", "fill ms", "ticks in flight",
    )  # fmt: skip
    print(
        f"{facts.name}: {facts.parameters:,} parameters, {facts.layers} layers; micro-batches of {facts.batch} x "
        f"{facts.time} tokens; {kinds[0].name} by data sheet\n"
    )
    print(table(header, rows))
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    heading = f"{facts.name}, {facts.parameters / 1e9:.1f} billion parameters on {kinds[0].name}s, simulated"
    print(f"\nplot: {draw_speedups(panels, output, title=heading)}")
    return 0
