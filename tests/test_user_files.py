"""Files that users name: writable or refused before the work, written whole and together or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_ouroboros.errors import InputFileError, OutputFileError
from hf_ouroboros.user_files import check_folder_writable, check_writable, read_text, written_together


def test_what_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    check_writable("--output", tmp_path / "new", tmp_path / "a" / "b" / "c", str(tmp_path / "old"))
    check_folder_writable("--output", tmp_path / "folder" / "in" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["old"], "nothing is left of the tries"


def test_what_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "is a folder, so no file can be written there"),
        (tmp_path / "file" / "below", "is a file, not a folder"),
        (tmp_path / "file" / "far" / "below", "is a file, not a folder"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "link", "is a link to nothing"),
        (tmp_path / "pipe", "is a device or pipe"),
        (Path("/proc/new"), "nothing can be written in '/proc'"),
        (tmp_path / "nul\0", "null byte"),
    ):
        with pytest.raises(OutputFileError, match=f"^--output: .*{message}"):
            check_writable("--output", path)
    with pytest.raises(OutputFileError, match="is a file, not a folder"):
        check_folder_writable("target", tmp_path / "file")


def test_together(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "x.json", tmp_path / "b" / "y.png"
    with written_together(first, second) as (one, two):
        one.write_text("1")
        two.write_text("2")
        assert (one.suffix, two.suffix, first.exists(), second.exists()) == (".json", ".png", False, False)
    assert (first.read_text(), second.read_text()) == ("1", "2")
    assert len(list(tmp_path.rglob("*"))) == 4


def test_or_not_at_all(tmp_path: Path) -> None:
    first, second = tmp_path / "x.json", tmp_path / "new" / "deep" / "y.png"
    first.write_text("old")
    with pytest.raises(ZeroDivisionError), written_together(first, second) as (one, two):
        one.write_text("1")
        two.write_text(str(1 // 0))
    with pytest.raises(OutputFileError, match="can't be written"), written_together(first, second) as (one, _):
        one.write_text("1")  # and not the other
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputFileError, match="is a folder"), written_together(first, tmp_path / "folder.png") as new:
        for path in new:
            path.write_text("1")
    assert first.read_text() == "old" and sorted(p.name for p in tmp_path.rglob("*")) == ["folder.png", "x.json"]


def test_reading(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc\xff")
    for path, most, message in (
        (file, 4, "can't be read .*utf-8"),
        (file, 3, "has 4 bytes, more than the 3"),
        (tmp_path, 9, "is no file"),
        ("/dev/zero", 9, "is no file"),
        (tmp_path / "nothing", 9, "No such file"),
        ("nul\0", 9, "null byte"),
    ):
        with pytest.raises(InputFileError, match=message):
            read_text(path, most)
    file.write_text("ä")
    assert read_text(file) == "ä"
