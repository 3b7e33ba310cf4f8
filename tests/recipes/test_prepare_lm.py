"""prepare_lm.py: splits, variants and vocabularies of the raw files."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import prepare_lm
import pytest
from common import OptionError
from transformers import AutoTokenizer

from hf_ouroboros.data import DataFileNotFoundError
from hf_ouroboros.data.prepared import PreparedStreams, TextUnits

WIKI = {"train": " \n = Snake = \n \n a snake bites <unk> tail .\n", "valid": " a tail .\n", "test": " snake\n\n"}


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: object) -> PreparedStreams:
    """Runs the recipe in a folder, where it puts its result."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["prepare_lm.py", *map(str, options)])
    prepare_lm.main()
    return PreparedStreams.load(folder / "data" / options[options.index("--corpus") + 1])


def text_of(streams: PreparedStreams, name: str) -> bytes:
    return streams.split(name).tokens.astype(np.uint8).tobytes()


def test_enwik8_is_cut_like_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    raw = ("<page>\n" * 30 + "ä").encode()[:200]
    (tmp_path / "raw").write_bytes(raw)
    streams = prepare(monkeypatch, tmp_path, "--corpus", "enwik8", "--source", "raw")
    assert [text_of(streams, name) for name in ("train", "validation", "test")] == [raw[:180], raw[180:190], raw[190:]]
    assert "200 bytes" in streams.description and "not the complete file" in streams.description
    assert "newlines kept" in streams.description
    assert len(AutoTokenizer.from_pretrained(tmp_path / "data/enwik8")) == 257

    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.write(tmp_path / "raw", "enwik8")
    options = ("--corpus", "enwik8", "--source", "raw.zip", "--newlines", "dropped")
    dropped = prepare(monkeypatch, tmp_path, *options)
    assert text_of(dropped, "train") == raw[:180].replace(b"\n", b"")
    assert "newlines dropped" in dropped.description
    kept, units = streams.split("train").units, dropped.split("train").units
    assert units == TextUnits(kept.bytes - raw[:180].count(b"\n"), kept.characters - raw[:180].count(b"\n"), kept.words)


def test_text8_is_letters_and_spaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text8").write_bytes(b" anarchism originated" * 10)
    streams = prepare(monkeypatch, tmp_path, "--corpus", "text8", "--source", "text8")
    assert sum(len(split.tokens) for split in streams.splits.values()) == 210
    (tmp_path / "text8").write_bytes(b"<page>")
    with pytest.raises(OptionError, match="2 other bytes"):
        prepare(monkeypatch, tmp_path, "--corpus", "text8", "--source", "text8")


def test_wikitext_lines_end_with_eos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wiki").mkdir()
    for name, text in WIKI.items():
        (tmp_path / f"wiki/wiki.{name}.tokens").write_text(text)
    streams = prepare(monkeypatch, tmp_path, "--corpus", "wikitext103", "--source", "wiki")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data/wikitext103")
    words = {name: tokenizer.convert_ids_to_tokens(split.tokens) for name, split in streams.splits.items()}
    assert " ".join(words["train"]) == "<eos> = Snake = <eos> <eos> a snake bites <unk> tail . <eos>"
    assert words["validation"] == ["a", "tail", ".", "<eos>"] and words["test"] == ["snake", "<eos>", "<eos>"]
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<eos>", "="]  # by frequency
    assert streams.split("train").units == TextUnits(len(WIKI["train"]), len(WIKI["train"]), 9)

    # the same as a data set, a row per line
    (tmp_path / "rows").mkdir()
    for name, split in (("train", "train"), ("valid", "validation"), ("test", "test")):
        (tmp_path / f"rows/{split}.txt").write_text(WIKI[name])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").rename(tmp_path / "first")
    rows = prepare(monkeypatch, tmp_path, "--corpus", "wikitext103", "--dataset_name", "rows")
    for name, split in streams.splits.items():
        assert rows.split(name).tokens.tolist() == split.tokens.tolist()


def test_wrong_sources_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for options, error, message in (
        (["--corpus", "enwik8"], OptionError, "source or dataset_name"),
        (["--corpus", "enwik8", "--source", "none"], DataFileNotFoundError, "no file at none"),
        (["--corpus", "wikitext103", "--source", "."], DataFileNotFoundError, "wiki.train.tokens"),
        (["--corpus", "text8", "--source", "x", "--newlines", "dropped"], OptionError, "a variant of enwik8"),
    ):
        with pytest.raises(error, match=message):
            prepare(monkeypatch, tmp_path, *options)
    assert not (tmp_path / "data").exists()
