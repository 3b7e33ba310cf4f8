"""`hf-ouroboros trace`: a recorded timeline as a table, a picture and a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_ouroboros.cli import main
from hf_ouroboros.commands.trace import where_the_time_went
from hf_ouroboros.simulate.simulator import StageCost, simulate
from hf_ouroboros.simulate.timeline import Event, Timeline


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    found = simulate("lockstep", [0, 1, 0], [StageCost(0.5, 1.0), StageCost(1.0, 2.0), StageCost(0.5, 1.0)], 2)
    return found.timeline.write(tmp_path / "run")[0]


def test_picture_and_page(recorded: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["trace", str(recorded)]) == 0
    assert f"picture: {recorded.with_suffix('.png')}" in capsys.readouterr().out
    page = recorded.with_name("page.html")
    assert main(["trace", str(recorded), "--output", str(page)]) == 0
    assert "F0 t0: forward" in page.read_text()
    part = recorded.with_name("part.png")
    assert main(["trace", str(recorded), "--output", str(part), "--window", "0", "9000"]) == 0
    assert part.read_bytes() != recorded.with_suffix(".png").read_bytes()


def test_where_the_time_went() -> None:
    timeline = Timeline(2, ["cpu:0", "cpu:1"])
    for tick in range(4):
        timeline.record(Event(0, 0, "forward", tick, 4.0 * tick, 4.0 * tick + 1))
        timeline.record(Event(0, 0, "backward", tick, 4.0 * tick + 2, 4.0 * tick + 4))
        timeline.record(Event(1, 1, "forward", tick, 4.0 * tick + 1, 4.0 * tick + 2))
    lines = [line.split() for line in where_the_time_went(timeline).splitlines()]
    assert lines[0] == ["device", "forward", "backward", "waiting"]
    assert lines[1] == ["cpu:0", "25.0%", "50.0%", "25.0%"]
    assert lines[2] == ["cpu:1", "25.0%", "0.0%", "75.0%"]
    assert (
        " ".join(lines[3])
        == "4 micro-batches in 16.000 s, 4000 ms each; in the steady state 4000 ms each, devices busy 75%, 25%"
    )
    short = Timeline(1)
    short.record(Event(0, 0, "forward", 0, 0.0, 1.0))
    assert where_the_time_went(short).endswith("1 micro-batches in 1.000 s, 1000 ms each; too short for a steady state")


def test_steady_state(recorded: Path) -> None:
    text = where_the_time_went(Timeline.from_chrome_trace(json.loads(recorded.read_text())))
    assert text.endswith("in the steady state 4000 ms each, devices busy 75%, 75%")  # 2 up, 2 back at once


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read: No such file"),
        ("{", "is no timeline of a run (JSONDecodeError"),
        ("[1]", "is no timeline of a run (TypeError"),
        ('{"traceEvents": []}', "is no timeline of a run (ValueError: A timeline needs num_devices"),
    ],
    ids=["missing", "no JSON", "no trace", "empty"],
)
def test_wrong_files(content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "run.json"
    if content is not None:
        file.write_text(content)
    assert main(["trace", str(file)]) == 1
    assert message in capsys.readouterr().err


def test_wrong_options(recorded: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["trace", str(recorded), "--output", "run.svg"]) == 1
    assert "must end in .png or .html" in capsys.readouterr().err
    assert main(["trace", str(recorded), "--window", "5", "5"]) == 1
    assert "is empty; give FROM < TO" in capsys.readouterr().err
