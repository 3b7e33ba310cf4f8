"""compare_transfo_xl.py: what it counts as memory, its table, and that finished runs are not repeated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import compare_transfo_xl
import numpy as np
import pytest
from common import OptionError

from hf_ouroboros.data import byte_tokenizer
from hf_ouroboros.data.prepared import PreparedSplit, PreparedStreams, TextUnits

ENWIK8 = Path(__file__).parents[2] / "../shared/data/enwik8_first_4154400_bytes"
TINY = ["--updates", "3", "--columns", "2", "--segment_len", "8", "--mem_len", "8", "--eval_mem_len", "24"]
TINY += ["--n_layer", "2", "--width", "32", "--validation_tokens", "200", "--seeds", "0", "--output_dir", "out"]


def compare(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["compare_transfo_xl.py", *TINY, *options])
    compare_transfo_xl.main()


def prepare(folder: Path, text: bytes) -> None:
    tokens = np.frombuffer(text, dtype=np.uint8)
    parts = {"train": tokens[:-300], "validation": tokens[-300:]}
    splits = {name: PreparedSplit(part, TextUnits(len(part), len(part), 1)) for name, part in parts.items()}
    PreparedStreams("Some bytes.", splits).save(folder, byte_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["generated", "enwik8"])
def test_table_and_files(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if source == "enwik8" and not ENWIK8.is_file():
        pytest.skip(f"needs {ENWIK8.name} beside the repository")
    text = ENWIK8.read_bytes()[:2000] if source == "enwik8" else bytes(range(250)) * 8
    prepare(tmp_path / "data", text)
    compare(monkeypatch, tmp_path, "--data_dir", "data")
    table = capsys.readouterr().out
    assert (tmp_path / "out/results.md").read_text() == table[table.index("| trained") :]
    runs = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert runs.keys() == {"transfo-xl-0", "transfo-xl_trained_without_memory-0", "gpt2-0"}
    for name, run in runs.items():
        assert f"| {run['contender']} | {run['parameters']:,} |" in table
        assert f"{run['memory off']:.3f} ({run['memory off']:.3f} - {run['memory off']:.3f})" in table
        assert (run["memory on"] is None) == ("without" in name)
    sizes = [run["parameters"] for run in runs.values()]
    assert max(sizes) < 1.02 * min(sizes)  # of equal size
    assert runs["transfo-xl-0"]["memory on"] != runs["transfo-xl-0"]["memory off"]
    assert "48 tokens seen" in table and "Some bytes." in table


def test_finished_runs_are_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare(tmp_path / "data", bytes(range(250)) * 8)
    options = ("--data_dir", "data", "--contenders", "gpt2")
    compare(monkeypatch, tmp_path, *options)
    monkeypatch.setattr(compare_transfo_xl, "train", None)  # would fail
    compare(monkeypatch, tmp_path, *options)
    with pytest.raises(OptionError, match="gpt2-0.json is of a run with other settings"):
        compare(monkeypatch, tmp_path, *options, "--learning_rate", "1")
    with pytest.raises(TypeError):
        compare(monkeypatch, tmp_path, *options, "--seeds", "1")


def test_more_updates_than_text_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare(tmp_path / "data", bytes(range(250)) * 8)
    with pytest.raises(OptionError, match="updates=200 is more than the 106 segments"):
        compare(monkeypatch, tmp_path, "--data_dir", "data", "--updates", "200")
