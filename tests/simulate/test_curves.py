"""The plot of speed-ups: a PNG of expected size, labels that don't overlap, schedules that can't run left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_ouroboros.commands.options import schedules
from hf_ouroboros.simulate.curves import INK, Panel, _spread, colour_of, draw_speedups


def panel(**speedups: list[float | None]) -> Panel:
    return Panel("M = 8", [2, 4, 8], [2.0, 3.9, 7.5], speedups)


def width(path: Path) -> int:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big")


def test_one_panel_and_two(tmp_path: Path) -> None:
    one = panel(pipelined=[2.0, 3.9, 7.4], lockstep=[1.5, 2.0, 2.4])
    single = draw_speedups([one], tmp_path / "one.png", title="toy")
    double = draw_speedups([one, panel(pipelined=[2.0, None, None])], tmp_path / "two.png", title="toy")
    assert width(double) > 1.8 * width(single)


def test_what_cannot_run_is_left_out(tmp_path: Path) -> None:
    assert draw_speedups([panel(interleaved=[None, None, None])], tmp_path / "none.png", title="toy").stat().st_size > 0


def test_against_links(tmp_path: Path) -> None:
    links = Panel(
        "8 devices", [8, 8, 8], [7.5] * 3, {"fsdp": [0.1, 1.0, 6.0], "pipelined": [4.0, 7.4, 7.5]}, [0.125, 1, 8]
    )
    assert links.places == [0.125, 1, 8] and panel().places == [2, 4, 8]
    assert width(draw_speedups([links], tmp_path / "links.png", title="toy")) == width(
        draw_speedups([panel()], tmp_path / "devices.png", title="toy")
    )


def test_every_schedule_has_a_colour() -> None:
    colours = [colour_of(schedule) for schedule in schedules()]
    assert len(set(colours)) == len(colours) and INK not in colours


def test_labels_are_moved_apart() -> None:
    placed = _spread({"a": 1.0, "b": 1.1, "c": 5.0}, 0.5)
    assert placed == {"a": 1.0, "b": pytest.approx(1.5), "c": 5.0}
