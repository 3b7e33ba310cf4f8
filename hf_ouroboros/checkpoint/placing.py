"""Directories that appear whole and go at once: a process that is killed at any moment leaves complete checkpoints.

written     .saving-X/checkpoint-5        put together, checked in, written out
placed      checkpoint-5                  one rename
replaced    checkpoint-5 <-> .saving-X    the old and the new one change places; where the file system can't do that,
                                          the old one waits as .saving-X/checkpoint-5.old, and comes back if need be
removed     .removing-X                   one rename, then file by file
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

_STAGING = ".saving-"
_TRASH = ".removing-"
_REPLACED = ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def appearing_whole(parent: str | Path) -> Iterator[Path]:
    """A directory to write checkpoints into; on leaving without an error they move into `parent` in one step each.

    Only one process at a time may do so for the same parent.
    """
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(parent)
    staging = parent / f"{_STAGING}{os.getpid()}-{secrets.token_hex(4)}"
    staging.mkdir()
    try:
        yield staging
        for path in sorted(staging.iterdir()):
            _write_out_directories(path)
            _place(path, parent / path.name)
        _write_out(parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def clear_leftovers(parent: str | Path) -> None:
    """Puts back what a killed process had moved away, and removes what it had not finished."""
    parent = Path(parent)
    for stale in sorted(parent.glob(f"{_STAGING}*")):
        for old in sorted(stale.glob(f"*{_REPLACED}")):
            target = parent / old.name.removesuffix(_REPLACED)
            if not target.exists():
                os.rename(old, target)
        shutil.rmtree(stale, ignore_errors=True)
    for stale in sorted(parent.glob(f"{_TRASH}*")):
        shutil.rmtree(stale, ignore_errors=True)


def discard(checkpoint: str | Path) -> None:
    """Removes a checkpoint: no part of it is ever left under its name."""
    checkpoint = Path(checkpoint)
    trash = checkpoint.parent / f"{_TRASH}{checkpoint.name}-{secrets.token_hex(4)}"
    os.rename(checkpoint, trash)
    shutil.rmtree(trash, ignore_errors=True)


def rotate(run_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond a limit, but never the newest or the best one, as Trainer does.

    Args:
        run_dir: where they are.
        limit: how many may stay; None or 0 for all.
        best: path of the best one.
    """
    if limit is None or limit <= 0:
        return
    found = sort_checkpoints(str(run_dir), use_mtime=True)
    # However they are spelt: the best one may be known by the path that a run was resumed from.
    kept = {os.path.realpath(path) for path in (*found[-1:], *([best] if best else []))}
    surplus = len(found) - max(limit, len(kept))
    for path in [path for path in found if os.path.realpath(path) not in kept][: max(0, surplus)]:
        discard(path)


def keep_only(run_dir: str | Path, checkpoint: str | Path) -> None:
    """Removes all other checkpoints."""
    for path in sort_checkpoints(str(run_dir)):
        if not os.path.samefile(path, checkpoint):
            discard(path)


# ---- inside ----


def _place(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        os.rename(target, new.with_name(new.name + _REPLACED))
        os.rename(new, target)


def _exchange(first: Path, second: Path) -> bool:
    """Has two directories change places in one step; False where the system has no such step."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _write_out_directories(directory: Path) -> None:
    for path in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        _write_out(path)


def _write_out(directory: Path) -> None:
    """Has the operating system write the names in a directory out."""
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
