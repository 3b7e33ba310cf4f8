"""`hf-ouroboros trace`: a recorded timeline as a table, a picture and a page."""

from __future__ import annotations

import json
import sys
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
    with pytest.raises(SystemExit) as caught:
        main(["trace", str(recorded), "--output", "run.svg"])
    assert caught.value.code == 2
    assert "must be the path of a file that ends in .png or .html" in capsys.readouterr().err
    assert main(["trace", str(recorded), "--output", str(recorded.with_name("run.html")), "--window", "5", "5"]) == 2
    assert "is empty; give FROM < TO" in capsys.readouterr().err
    table = recorded.rename(recorded.with_suffix(".png"))
    assert main(["trace", str(table)]) == 2
    assert "is the timeline itself; name another file" in capsys.readouterr().err


WRONG = [None, [], {}, "x", float("inf"), float("nan"), -1, True, 1e300, 10**5000, "\ud800"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tid", "ts", "dur", "cat", "args", "stage", "tick", "name", "device"])
def test_wrong_values_in_a_trace(recorded: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    """Refused by name, or drawn; never a half-written file."""
    content = json.loads(recorded.read_text())
    rows = content["traceEvents"]
    row = next(r for r in rows if r["ph"] == ("M" if name == "device" else "X"))
    where, key = (
        (row["args"], "name" if name == "device" else name) if name in ("stage", "tick", "device") else (row, name)
    )
    good, files = where[key], set(recorded.parent.iterdir())
    for wrong in WRONG:
        where[key] = wrong
        sys.set_int_max_str_digits(0)
        recorded.write_text(json.dumps(content))
        sys.set_int_max_str_digits(4300)
        output = recorded.with_name("again.png")
        status = main(["trace", str(recorded), "--output", str(output)])
        told = capsys.readouterr().err
        unused = name == "name" and wrong != 10**5000  # what a row is called is for those who look at it
        allowed = unused or (name, wrong) in (("stage", None), ("device", "x"))
        assert (status, output.exists()) == ((0, True) if allowed else (1, False)), (wrong, told)
        assert allowed or ("is no timeline of a run" in told and len(told) < 500)
        output.unlink(missing_ok=True)
    where[key] = good
    assert set(recorded.parent.iterdir()) == files


def test_a_name_is_no_formula(recorded: Path) -> None:
    recorded.write_text(recorded.read_text().replace("device 0", "$\\\\frac$").replace("device 1", "<b>"))
    assert main(["trace", str(recorded)]) == 0
    assert main(["trace", str(recorded), "--output", str(recorded.with_name("run.html"))]) == 0
    assert "&lt;b&gt;" in recorded.with_name("run.html").read_text()


def test_a_run_of_no_time_at_all(tmp_path: Path) -> None:
    timeline = Timeline(1)
    for tick in range(40):
        timeline.record(Event(0, 0, "forward", tick, 0.0, 0.0))
    file = timeline.write(tmp_path / "run")[0]
    assert main(["trace", str(file)]) == 0
    assert main(["trace", str(file), "--window", "-1", "1"]) == 0


def test_no_end_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["trace", "/dev/zero", "--output", str(tmp_path / "x.png")]) == 1
    assert "is no file" in capsys.readouterr().err
