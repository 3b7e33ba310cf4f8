"""`hf-ouroboros trace`: a recorded timeline as a picture, a page, and a table of where the time went."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import UnsupportedOptionError
from ..simulate.timeline import Timeline
from .tables import milliseconds, table

KINDS = ("forward", "backward", "weights", "recompute", "step", "settle")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to those of `hf-ouroboros`."""
    parser = commands.add_parser(
        "trace",
        help="where the time of a recorded run went (the JSON file of OuroborosArguments.timeline)",
        description="Prints a table and writes a picture or a page of a timeline that a run recorded.",
    )
    parser.add_argument("file", help="timeline JSON of a run with --timeline")
    parser.add_argument(
        "--output", default=None, help="a .png (a few ticks, and an overview) or a .html (all of it); default FILE.png"
    )
    parser.add_argument("--window", nargs=2, type=float, default=None, metavar=("FROM", "TO"), help="of the PNG, in ms")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Reads, prints and draws; returns the exit status."""
    from ..simulate.page import write_page
    from ..simulate.picture import draw

    source = Path(arguments.file)
    timeline = read_timeline(source)
    output = Path(arguments.output) if arguments.output else source.with_suffix(".png")
    if output.suffix not in (".png", ".html"):
        raise UnsupportedOptionError(f"--output {str(output)!r} must end in .png or .html")
    window = None
    if arguments.window is not None:
        zero = timeline.interval[0]
        window = zero + arguments.window[0] / 1e3, zero + arguments.window[1] / 1e3
        if not window[0] < window[1]:
            raise UnsupportedOptionError(f"--window {arguments.window} is empty; give FROM < TO in milliseconds")
    summary = where_the_time_went(timeline)
    print(summary)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".html":
        print(f"\npage: {write_page(timeline, output, summary=summary, title=source.name)}")
    else:
        print(f"\npicture: {draw(timeline, output, window=window)}")
    return 0


def read_timeline(path: Path) -> Timeline:
    """A timeline from the file that a run wrote.

    Raises:
        UnsupportedOptionError: the file is missing or is no such timeline.
    """
    try:
        timeline = Timeline.from_chrome_trace(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UnsupportedOptionError(f"{str(path)!r} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedOptionError(
            f"{str(path)!r} is no timeline of a run ({type(error).__name__}: {error}); record one with "
            "OuroborosArguments(timeline=...)"
        ) from error
    if not timeline.forward_ends():
        raise UnsupportedOptionError(f"{str(path)!r} holds no forward of any micro-batch; there is nothing to see")
    return timeline


def where_the_time_went(timeline: Timeline) -> str:
    """Per device: share of the run by kind of work, waiting, and busy share; then the whole run in a line."""
    start, end = timeline.interval
    span = end - start or 1.0
    kinds = [kind for kind in KINDS if any(e.kind == kind for e in timeline.events)]
    rows = []
    for device in timeline.summary():
        shares = [device["seconds"].get(kind, 0.0) / span for kind in kinds]
        rows.append((device["name"], *(f"{s:.1%}" for s in shares), f"{device['waiting'] / span:.1%}"))
    ticks = len(timeline.forward_ends())
    line = f"{ticks} micro-batches in {span:.3f} s, {milliseconds(span / ticks)} ms each"
    stages = {e.stage for e in timeline.events if e.stage is not None}
    try:
        first, last = timeline.steady_interval(len(stages))
    except ValueError:
        return f"{table(('device', *kinds, 'waiting'), rows)}\n{line}; too short for a steady state"
    steady = sum(first < done <= last for done in timeline.forward_ends().values())
    busy = ", ".join(f"{share:.0%}" for share in timeline.busy_shares(first, last))
    line += f"; in the steady state {milliseconds((last - first) / steady)} ms each, devices busy {busy}"
    return f"{table(('device', *kinds, 'waiting'), rows)}\n{line}"
