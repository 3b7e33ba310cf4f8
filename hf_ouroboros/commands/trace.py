"""`hf-ouroboros trace`: a recorded timeline as a picture, a page, and a table of where the time went."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import InputFileError, UnsupportedOptionError
from ..options import Number, Place, from_json
from ..simulate.timeline import Timeline
from ..user_files import check_writable, read_text, written_together
from .tables import milliseconds, table

KINDS = ("forward", "backward", "weights", "recompute", "step", "settle")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to those of `hf-ouroboros`."""
    parser = commands.add_parser(
        "trace",
        help="where the time of a recorded run went (the JSON file of OuroborosArguments.timeline)",
        description="Prints a table and writes a picture or a page of a timeline that a run recorded.",
    )
    parser.add_argument("file", type=Place(), help="timeline JSON of a run with --timeline")
    parser.add_argument(
        "--output",
        type=Place((".png", ".html")),
        default=None,
        help="a .png (a few ticks, and an overview) or a .html (all of it); default FILE.png",
    )
    parser.add_argument(
        "--window", nargs=2, type=Number(-1e12, 1e12), default=None, metavar=("FROM", "TO"), help="of the PNG, in ms"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Reads, prints and draws; returns the exit status."""
    from ..simulate.page import write_page
    from ..simulate.picture import draw

    source = Path(arguments.file)
    output = Path(arguments.output) if arguments.output else source.with_suffix(".png")
    if arguments.window is not None and not arguments.window[0] < arguments.window[1]:
        raise UnsupportedOptionError(f"--window {arguments.window} is empty; give FROM < TO in milliseconds")
    if os.path.realpath(output) == os.path.realpath(source):
        raise UnsupportedOptionError(f"--output {str(output)!r} is the timeline itself; name another file")
    timeline = read_timeline(source)
    check_writable("--output", output)
    window = None
    if arguments.window is not None:
        zero = timeline.interval[0]
        window = zero + arguments.window[0] / 1e3, zero + arguments.window[1] / 1e3
        if not window[0] < window[1]:
            raise UnsupportedOptionError(
                f"--window {arguments.window} is shorter than times of this run can tell apart"
            )
    summary = where_the_time_went(timeline)
    print(summary)
    with written_together(output) as (new,):
        if output.suffix == ".html":
            write_page(timeline, new, summary=summary, title=source.name)
        else:
            draw(timeline, new, window=window)
    print(f"\n{'page' if output.suffix == '.html' else 'picture'}: {output}")
    return 0


def read_timeline(path: Path) -> Timeline:
    """A timeline from the file that a run wrote.

    Raises:
        InputFileError: the file is missing or is no such timeline.
    """
    text = read_text(path)
    try:
        timeline = Timeline.from_chrome_trace(from_json(text))
    except (ValueError, KeyError, TypeError) as error:
        raise InputFileError(
            f"{str(path)!r} is no timeline of a run ({type(error).__name__}: {error}); record one with "
            "OuroborosArguments(timeline=...)"
        ) from error
    if not timeline.forward_ends():
        raise InputFileError(f"{str(path)!r} holds no forward of any micro-batch; there is nothing to see")
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
