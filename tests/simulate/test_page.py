"""The HTML page of a timeline: well formed, every event with its details, nothing that needs a script."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from hf_ouroboros.simulate.page import write_page
from hf_ouroboros.simulate.timeline import Event, Timeline


def test_every_event_is_there(tmp_path: Path) -> None:
    timeline = Timeline(2, ["cpu:0", "<cpu:1>"])
    timeline.record(Event(0, 0, "forward", 0, 10.0, 10.5))
    timeline.record(Event(0, 2, "backward", 0, 10.5, 11.0))
    timeline.record(Event(1, 1, "forward", 0, 10.5, 11.0))
    timeline.record(Event(1, 1, "wait", 1, 11.0, 12.0))
    timeline.record(Event(1, 1, "step", 0, 12.0, 12.25))
    text = write_page(timeline, tmp_path / "page.html", summary="a < b", title="toy & run").read_text()
    assert "<script" not in text
    assert "&lt;cpu:1&gt;" in text and "a &lt; b" in text and "toy &amp; run" in text
    drawing = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    tips = [title.text for title in drawing.iter("title")]
    assert tips == [
        "F0 t0: forward of stage 0, 500.000 ms from 0.000 ms",
        "B2 t0: backward of stage 2, 500.000 ms from 500.000 ms",
        "F1 t0: forward of stage 1, 500.000 ms from 500.000 ms",
        "S1 u0: step of stage 1, 250.000 ms from 2000.000 ms",
    ]
    assert [rect.get("fill-opacity") for rect in drawing.iter("rect") if len(rect)] == [None, "0.5", None, None]


def test_long_runs_stay_drawable(tmp_path: Path) -> None:
    timeline = Timeline(1)
    for i in range(20_000):
        timeline.record(Event(0, 0, "forward", i, float(i), i + 0.5))
    text = write_page(timeline, tmp_path / "page.html").read_text()
    assert '<svg width="200000"' in text
