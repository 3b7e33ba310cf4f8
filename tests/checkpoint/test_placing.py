"""Directories that appear whole and go at once; what a killed process left behind is put right by the next one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from trainer_helpers import trained

import hf_ouroboros.hooks.checkpoints
from hf_ouroboros.checkpoint import load_run_state, placing
from hf_ouroboros.checkpoint.placing import appearing_whole, clear_leftovers, discard, keep_only, rotate


@pytest.fixture(params=["exchange", "two renames"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the old and the new checkpoint of a step change places."""
    if request.param == "two renames":
        monkeypatch.setattr(placing, "_exchange", lambda first, second: False)


def test_appearing_whole(tmp_path: Path) -> None:
    with appearing_whole(tmp_path / "run") as staging:
        (staging / "checkpoint-1" / "sub").mkdir(parents=True)
        (staging / "checkpoint-1" / "sub" / "a").write_text("a")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [staging.name]
        assert staging.name.startswith(".")
    assert (tmp_path / "run" / "checkpoint-1" / "sub" / "a").read_text() == "a"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


def test_appearing_whole_replaces(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "old").write_text("old")
    with appearing_whole(tmp_path) as staging:
        (staging / "checkpoint-1").mkdir()
        (staging / "checkpoint-1" / "new").write_text("new")
    assert [path.name for path in (tmp_path / "checkpoint-1").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_appearing_whole_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(KeyError), appearing_whole(tmp_path) as staging:
        (staging / "checkpoint-2").mkdir()
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_leftovers_are_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / ".saving-1" / "checkpoint-1"
    left.mkdir(parents=True)
    (left / "part").write_text("part")
    with appearing_whole(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def make(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "content").write_text(name)
        os.utime(folder / name, (1000 + 10 * i, 1000 + 10 * i))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_what_was_moved_away_comes_back(tmp_path: Path, there: bool) -> None:
    make(tmp_path, ".saving-1/checkpoint-5.old", ".saving-1/checkpoint-6", ".removing-checkpoint-2-x")
    if there:
        make(tmp_path, "checkpoint-5")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-5"]
    assert (tmp_path / "checkpoint-5" / "content").read_text() == (
        "checkpoint-5" if there else ".saving-1/checkpoint-5.old"
    )


def test_never_a_moment_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every rename, a complete checkpoint is there, or will be put back."""
    make(tmp_path, "checkpoint-1")
    seen = []
    rename = os.rename

    def looking(*args: Any) -> None:
        held = [path for path in tmp_path.glob("checkpoint-1/content")]
        seen.append(held or list(tmp_path.glob(".saving-*/checkpoint-1.old/content")))
        rename(*args)

    monkeypatch.setattr(os, "rename", looking)
    with appearing_whole(tmp_path) as staging:
        make(staging, "checkpoint-1")
    assert all(seen)
    assert names(tmp_path) == ["checkpoint-1"]


def test_discard(tmp_path: Path) -> None:
    make(tmp_path, "checkpoint-1", "checkpoint-2")
    discard(tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-2"]


def test_the_best_one_stays_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("out"), "checkpoint-1", "checkpoint-2", "checkpoint-3")
    rotate("out", 2, str(tmp_path / "out" / "checkpoint-1"))
    assert names(Path("out")) == ["checkpoint-1", "checkpoint-3"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (4, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (1, None, [4]),
        (2, 1, [1, 4]),
        (1, 2, [2, 4]),
        (3, 1, [1, 3, 4]),
        (1, 4, [4]),
    ],
)
def test_rotate(tmp_path: Path, limit: int | None, best: int | None, left: list[int]) -> None:
    """As transformers' own rotation would."""
    from transformers.trainer_utils import rotate_checkpoints

    for folder, function in ((tmp_path / "ours", rotate), (tmp_path / "theirs", rotate_checkpoints)):
        make(folder, "checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4")
        path = str(folder / f"checkpoint-{best}") if best else None
        if function is rotate:
            rotate(folder, limit, path)
        else:
            rotate_checkpoints(str(folder), limit, path, use_mtime=True)
        assert names(folder) == [f"checkpoint-{step}" for step in left]


def test_keep_only(tmp_path: Path) -> None:
    make(tmp_path, "checkpoint-1", "checkpoint-2", "checkpoint-3", "other")
    keep_only(tmp_path, tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-2", "other"]


def whole(folder: Path) -> list[str]:
    """Checkpoints that can be resumed from."""
    found = sorted(folder.glob("checkpoint-*"))
    for path in found:
        load_run_state(path)
    return [path.name for path in found]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["write_manifest", "rotate"])
def test_error_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A full disk, say: the error comes out, earlier checkpoints stay, nothing is left over."""
    original, calls = getattr(hf_ouroboros.hooks.checkpoints, where), []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(hf_ouroboros.hooks.checkpoints, where, failing)
    with pytest.raises(OSError, match="No space left"):
        trained(tmp_path, save_strategy="steps", save_steps=1)
    assert whole(tmp_path) == [f"checkpoint-{step}" for step in range(1, 3 if where == "write_manifest" else 4)]
    assert not list(tmp_path.glob(".saving-*"))
