"""`hf-ouroboros simulate`: a table and a plot of speed-ups."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_ouroboros.cli import main
from hf_ouroboros.commands import options

SMALL = ["gpt2", "--config_overrides", "n_layer=8,n_embd=64,n_head=4,vocab_size=128", "--seq", "32"]


@pytest.mark.slow
def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "plots" / "speed.png"
    arguments = ["--counts", "4", "2", "--micro_batches", "2", "8", "--link", "25", "1", "--output", str(output)]
    assert main(["simulate", *SMALL, *arguments]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line and line[0] in ("pipelined", "lockstep", "1f1b", "zero_bubble")]
    assert len(rows) == 4 * 2 * 2 * 2
    assert [row[1] for row in rows[:2]] == ["2", "4"]
    assert output.read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_run_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--counts", "2", "8", "--schedules", "interleaved", "--output", str(tmp_path / "speed.png")]
    assert main(["simulate", *SMALL, *arguments]) == 0  # 8 devices would need 16 stages of 8 layers
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("interleaved")]) == 1
    (reason,) = (line for line in lines if line.startswith("not simulated"))
    assert "interleaved on 8 devices with M = 8, num_stages=16 is more than the model's 8 layers" in reason


def test_against_links(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Where links are slow, handing on hidden states costs less than gathering layers; an M is left out that it can't do."""
    output = tmp_path / "links.png"
    arguments = ["--against", "links", "--counts", "4", "--link", "100", "1", "--micro_batches", "4", "6"]
    assert main(["simulate", *SMALL, *arguments, "--schedules", "pipelined", "fsdp", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("pipelined", "fsdp"))]
    assert [row[:4] for row in rows[:4]] == [
        [name, "4", "4", speed] for name in ("pipelined", "fsdp") for speed in ("1", "100")
    ]
    slow, fast, slow_fsdp, fast_fsdp = (float(row[4]) for row in rows[:4])
    assert slow_fsdp < slow <= fast and slow_fsdp < fast_fsdp
    assert sum("fsdp on 4 devices with M = 6" in line for line in lines) == 1
    assert output.read_bytes()[:4] == b"\x89PNG"


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["simulate", *SMALL, "--kind", "cpu:0", "--output", str(tmp_path / "speed.png")]) == 2
    assert "--kind 'cpu:0' must be one kind of device by data sheet" in capsys.readouterr().err
    assert main(["simulate", *SMALL, "--kind", "abacus", "--output", str(tmp_path / "speed.png")]) == 2
    assert "--kind 'abacus' is unknown" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--output", "plot.svg", "must be the path of a file that ends in .png"),
        ("--counts", "1000000", "must be a whole number from 1 to 128"),
        ("--counts", "0", "must be a whole number from 1 to 128"),
        ("--micro_batches", "1000000000", "must be a whole number from 1 to 65,536"),
        ("--link", "inf", "must be a number of at least 1e-06"),
        ("--latency", "nan", "must be a number of at least 0"),
    ],
)
def test_values_out_of_bounds(option: str, value: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["simulate", *SMALL, option, value])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_what_would_take_minutes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--counts", "128", "--micro_batches", "65536", "--output", str(tmp_path / "speed.png")]
    assert main(["simulate", *SMALL, *arguments]) == 2
    assert "take too long to simulate" in capsys.readouterr().err
    monkeypatch.setattr(options, "MOST_SPLITTING", options.MOST_SPLITTING // 10**4)  # else it takes 600 layers
    deep = ["gpt2", "--config_overrides", "n_layer=30,n_embd=16,n_head=2,vocab_size=64,n_positions=8", "--seq", "8"]
    assert main(["simulate", *deep, "--output", str(tmp_path / "speed.png")]) == 2
    assert "30 layers on 2 devices have too many splits" in capsys.readouterr().err


@pytest.mark.slow
def test_the_claim(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """GPT-2 XL's shapes over 25 GB/s: pipelined keeps 95 % of what its split can, lockstep stays below 3."""
    xl = ["gpt2", "--config_overrides", "n_layer=48,n_embd=1600,n_head=25", "--dtype", "bfloat16"]
    arguments = ["--counts", "8", "16", "--schedules", "pipelined", "lockstep", "--output", str(tmp_path / "xl.png")]
    assert main(["simulate", *xl, *arguments]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shares = [float(row[5].rstrip("%")) for row in rows if row and row[0] == "pipelined"]
    assert len(shares) == 2 and min(shares) >= 95
    speedups = [float(row[4]) for row in rows if row and row[0] == "lockstep"]
    assert len(speedups) == 2 and max(speedups) < 3
