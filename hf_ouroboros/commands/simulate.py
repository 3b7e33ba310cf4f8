"""`hf-ouroboros simulate`: speed-up against the number of devices, for schedules, M and link speeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import DeviceMapError, UnsupportedOptionError
from ..options import Place, Whole
from ..simulate.peers import PEERS
from ..simulate.simulator import ours
from ..user_files import check_writable, written_together
from .options import GIGABYTES, add_link_options, add_model_options, check_work, data_type, links, load_config
from .tables import table

MOST_PANELS = 24


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to those of `hf-ouroboros`."""
    parser = commands.add_parser(
        "simulate",
        help="speed-up against the number of devices: schedules, micro-batches and links compared",
        description="Simulates the engine's own programs, and those of other software, with each split at its best.",
    )
    add_model_options(parser)
    parser.add_argument("--kind", default="rtx3090", help="kind of the devices, as for `plan --devices`")
    parser.add_argument("--counts", nargs="+", type=Whole(1, 128), default=[2, 4, 8, 16], help="numbers of devices")
    parser.add_argument("--micro_batches", nargs="+", type=Whole(1, 2**16), default=[8], help="M, one panel for each")
    parser.add_argument(
        "--link", nargs="+", type=GIGABYTES, default=[25.0], help="GB/s, one panel for each (default 25)"
    )
    add_link_options(parser)
    parser.add_argument("--schedules", nargs="+", choices=[*ours(), *PEERS], default=ours(), metavar="SCHEDULE")
    parser.add_argument("--output", type=Place((".png",)), default="speedup.png", help="the plot (default speedup.png)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Sweeps; returns the exit status."""
    from dataclasses import replace

    from ..planning.hardware import parse_devices
    from ..planning.memory_model import MemoryOptions
    from ..planning.planner import estimated, plan_split
    from ..planning.unit_facts import model_facts
    from ..simulate.curves import Panel, draw_speedups
    from .prediction import ideal, predict

    output = Path(arguments.output)
    check_writable("--output", output)
    try:
        kinds = parse_devices([arguments.kind])
    except DeviceMapError as error:
        raise UnsupportedOptionError(str(error).replace("--devices", "--kind", 1)) from error
    if len(kinds) != 1 or isinstance(kinds[0], str):
        raise UnsupportedOptionError(f"--kind {arguments.kind!r} must be one kind of device by data sheet, as rtx3090")
    if len(arguments.micro_batches) * len(arguments.link) > MOST_PANELS:
        raise UnsupportedOptionError(
            f"--micro_batches and --link make more than {MOST_PANELS} panels; give fewer of them"
        )
    config = load_config(arguments)
    facts = model_facts(config, arguments.batch, arguments.seq, data_type(arguments, config))
    counts = sorted(set(arguments.counts))
    times = len(arguments.link) * len(arguments.schedules)
    check_work(facts.layers, [(count, m) for count in counts for m in arguments.micro_batches for _ in range(times)])
    # Whether it fits is the planner's question; here only time counts.
    device = replace(estimated(facts, kinds[0]), memory=float("inf"))
    rows, panels = [], []
    for micro_batches in arguments.micro_batches:
        options = MemoryOptions(micro_batches=micro_batches, recompute=arguments.recompute, weights=arguments.weights)
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
                            f"{found.speedup / best:.1%}" if schedule in ours() else "",
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
    heading = f"{facts.name}, {facts.parameters / 1e9:.1f} billion parameters on {kinds[0].name}s, simulated"
    with written_together(output) as (new,):
        draw_speedups(panels, new, title=heading)
    print(f"\nplot: {output}")
    return 0
