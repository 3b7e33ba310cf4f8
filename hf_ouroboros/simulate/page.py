"""A timeline as one HTML page without scripts: all ticks in a row to scroll through, details under the pointer."""

from __future__ import annotations

import html
from pathlib import Path

from .picture import COLOURS, IDLE
from .timeline import Timeline

ROW, GAP, LABELS = 40, 10, 130  # pixels
PIXELS_PER_EVENT = 26  # on average, on the busiest device
LONGEST = 200_000  # pixels; browsers draw no more


def write_page(timeline: Timeline, path: str | Path, *, summary: str = "", title: str = "timeline") -> Path:
    """Writes the page; the file's folder exists.

    Args:
        timeline: with events.
        path: the file.
        summary: plain text above the timeline.
        title: of the page.
    """
    start, end = timeline.interval
    most = max(sum(e.device == d for e in timeline.events) for d in range(timeline.num_devices))
    width = min(LONGEST, max(900, most * PIXELS_PER_EVENT))
    scale = width / ((end - start) or 1.0)
    shapes = []
    for device in range(timeline.num_devices):
        shapes.append(f'<rect x="0" y="{device * (ROW + GAP)}" width="{width}" height="{ROW}" fill="{IDLE}"/>')
    lowest: dict[int, int] = {}
    for e in timeline.events:
        if e.stage is not None:
            lowest[e.device] = min(e.stage, lowest.get(e.device, e.stage))
    for e in timeline.events:
        if not e.is_work:
            continue
        x, y, wide = (e.start - start) * scale, e.device * (ROW + GAP), max((e.end - e.start) * scale, 0.5)
        pale = "" if e.stage == lowest.get(e.device) else ' fill-opacity="0.5"'
        tip = f"{e.name}: {e.kind} of stage {e.stage}, {(e.end - e.start) * 1e3:.3f} ms from {(e.start - start) * 1e3:.3f} ms"
        shapes.append(
            f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{ROW}" fill="{COLOURS[e.kind]}"{pale}>'
            f"<title>{html.escape(tip)}</title></rect>"
        )
        if wide > 9 * len(str(e.index)) and e.kind != "step":
            shapes.append(f'<text x="{x + wide / 2:.2f}" y="{y + ROW / 2 + 4}">{e.index}</text>')
    height = timeline.num_devices * (ROW + GAP)
    names = "".join(f"<div>{html.escape(name)}</div>" for name in timeline.device_names)
    kinds = [kind for kind in COLOURS if any(e.kind == kind for e in timeline.events)]
    legend = " ".join(f'<i style="background:{COLOURS[kind]}"></i>{kind}' for kind in kinds)
    path = Path(path)
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 14px sans-serif; margin: 24px; color: #1c1c22 }}
pre {{ font-size: 13px }}
i {{ display: inline-block; width: 14px; height: 14px; margin: 0 4px 0 12px; vertical-align: -2px }}
.run {{ display: flex }}
.names {{ width: {LABELS}px; flex: none }}
.names div {{ height: {ROW + GAP}px; line-height: {ROW}px }}
.scroll {{ overflow-x: auto; flex: 1 }}
svg text {{ font: 12px sans-serif; fill: #1c1c22; text-anchor: middle; pointer-events: none }}
svg rect:hover {{ stroke: #1c1c22 }}
</style>
<h1>{html.escape(title)}</h1>
<pre>{html.escape(summary)}</pre>
<p>{legend} <i style="background:{IDLE}"></i>waiting; a device's further stages are paler</p>
<div class="run"><div class="names">{names}</div><div class="scroll">
<svg width="{width}" height="{height}">{"".join(shapes)}</svg></div></div>
</html>
"""
    path.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))  # names of files need not be text
    return path
