"""The picture: written, sized and inked as meant, for short, long, empty and odd timelines."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_ouroboros.simulate.picture import COLOURS, WINDOW_TICKS, busy_profile, default_window, draw
from hf_ouroboros.simulate.timeline import Event, Timeline


def snake(ticks: int) -> Timeline:
    """Two devices, three stages; device 0 runs stages 0 and 2, one period takes 10 ms."""
    timeline = Timeline(2, ["cpu:0", "cpu:1"])
    for t in range(ticks):
        x = t * 0.010
        timeline.record(Event(0, 2, "backward", t, x, x + 0.003))
        timeline.record(Event(0, 0, "forward", t, x + 0.003, x + 0.006))
        timeline.record(Event(0, 0, "wait", t, x + 0.006, x + 0.010))
        timeline.record(Event(1, 1, "forward", t, x + 0.006, x + 0.009))
        timeline.record(Event(1, 1, "step", t, x + 0.009, x + 0.010))
    return timeline


def size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def pixels(path: Path) -> set[tuple[int, ...]]:
    from matplotlib.image import imread

    return {tuple(p) for p in (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)}


def test_a_short_run_is_shown_whole_without_overview(tmp_path: Path) -> None:
    short, long = snake(WINDOW_TICKS), snake(WINDOW_TICKS * 10)
    assert default_window(short) == short.interval
    assert size(draw(short, tmp_path / "short.png"))[1] < size(draw(long, tmp_path / "long.png"))[1]


def test_a_long_run_shows_whole_ticks_from_its_middle() -> None:
    start, end = default_window(snake(100))
    assert end - start == pytest.approx(WINDOW_TICKS * 0.010)
    assert start == pytest.approx(0.010 * (100 - WINDOW_TICKS) / 2, abs=0.010)


def test_every_kind_has_its_colour_in_the_picture(tmp_path: Path) -> None:
    timeline = Timeline(1)
    for i, kind in enumerate(COLOURS):
        timeline.record(Event(0, 0, kind, i, float(i), i + 0.9))
    inked = pixels(draw(timeline, tmp_path / "kinds.png"))
    for colour in COLOURS.values():
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in inked


def test_two_stages_of_a_device_differ(tmp_path: Path) -> None:
    pictures = []
    for second in (0, 1):
        timeline = Timeline(1)
        timeline.record(Event(0, 0, "forward", 0, 0.0, 1.0))
        timeline.record(Event(0, second, "forward", 0, 1.0, 2.0))
        pictures.append(pixels(draw(timeline, tmp_path / f"{second}.png")))
    assert pictures[1] - pictures[0]


def test_the_same_timeline_gives_the_same_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda i: draw(snake(60), tmp_path / f"{i}.png"), range(4)))
    assert len({path.read_bytes() for path in paths}) == 1


@pytest.mark.parametrize("devices", [1, 4, 9])
def test_height_grows_with_devices(tmp_path: Path, devices: int) -> None:
    timeline = Timeline(devices, [f"a-rather-long-host-name-{i}:cuda:{i}" for i in range(devices)])
    for d in range(devices):
        timeline.record(Event(d, d, "forward", 0, 0.0, 1.0))
    width, height = size(draw(timeline, tmp_path / "n.png", title="costs $5 and 100 %"))
    assert width == 1540
    assert height == pytest.approx(154 + 68 * devices, abs=2)  # rows of 0.62 inch at 110 dpi, rounded to pixels


def test_odd_timelines_are_drawn(tmp_path: Path) -> None:
    assert size(draw(Timeline(3), tmp_path / "empty.png"))
    instant = Timeline(1)
    instant.record(Event(0, None, "settle", 0, 5.0, 5.0))
    assert size(draw(instant, tmp_path / "instant.png"))


def test_window_may_be_chosen(tmp_path: Path) -> None:
    assert size(draw(snake(30), tmp_path / "w.png", window=(0.05, 0.08)))
    with pytest.raises(ValueError, match="is empty; give"):
        draw(snake(30), tmp_path / "w.png", window=(0.08, 0.05))


def test_busy_profile_adds_up_to_the_busy_share() -> None:
    timeline = snake(37)
    for device, bins in [(0, 8), (1, 8), (0, 160), (1, 1)]:
        profile = busy_profile(timeline, device, bins)
        assert len(profile) == bins
        assert all(0.0 <= share <= 1.0 + 1e-9 for share in profile)  # sums of floats
        assert sum(profile) / bins == pytest.approx(timeline.busy_share(device))
