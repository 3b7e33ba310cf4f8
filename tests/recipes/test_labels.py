"""Long labels, and the pictures that have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from labels import in_lines
from staleness_picture import Panel, draw
from staleness_report import Interval

LONG = "muon+weight_prediction+error_feedback+lr_rescale (anneal=0,rescaled=adamw) delay warm-up 100"


def test_lines_end_where_settings_end() -> None:
    assert in_lines(LONG, 44).splitlines() == [
        "muon+weight_prediction+error_feedback+",
        "  lr_rescale (anneal=0,rescaled=adamw) delay",
        "  warm-up 100",
    ]
    setting = (
        "pipelined:delay_compensation=muon+weight_prediction+error_feedback,delay_compensation_args=prediction=step"
    )
    lines = in_lines(setting).splitlines()
    assert "".join(line.strip() for line in lines) == setting
    assert len(lines) == 3 and max(map(len, lines)) <= 45


def test_short_labels_are_left_alone() -> None:
    assert in_lines("torch-1f1b:M=8") == "torch-1f1b:M=8"
    assert in_lines("none delay warm-up 100") == "none delay warm-up 100"


@pytest.mark.parametrize("delays", [[4.0], [0.22, 0.25, 8.0]])
def test_the_legend_lies_within_the_picture(
    delays: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **named: (drawn.append(self), save(self, *args, **named))
    )
    values = {(delay, stages): Interval(delay, 0.1, 3) for delay in delays for stages in (5, 9)}
    draw([Panel("loss", 0.0, {LONG: values, "none": values, "muon": {}})], tmp_path / "cost.png", "text")
    (figure,) = drawn
    extent = figure.legends[0].get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width and extent.y0 >= 0
    assert extent.y1 <= figure.axes[0].get_tightbbox().y0, "over the axes"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [f"{delay:g}" for delay in delays]
    assert figure.axes[0].get_xlim() == (-0.5, len(delays) - 0.5)
