"""Files that a user names: read within bounds; found to be writable before the work, written whole or not at all.

check_writable("--output", path)                    before the work
with written_together(first, second) as (a, b):     after it: a and b are new files beside them,
    ...                                             which get their names only when both are complete
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from .errors import InputFileError, OutputFileError

if TYPE_CHECKING:
    from transformers import TrainingArguments

MOST_BYTES = 2**30  # of a text file that is read at once


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The text of a file.

    Args:
        path: of a regular file; a pipe or a device might never end.
        most: how many bytes it may have.

    Raises:
        InputFileError: it is missing, no file, too large, or no UTF-8.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise InputFileError(f"{str(path)!r} is no file; give the path of one")
        if found.st_size > most:
            raise InputFileError(
                f"{str(path)!r} has {found.st_size:,} bytes, more than the {most:,} that are read at once"
            )
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputFileError(f"{str(path)!r} can't be read: {error.strerror}") from error
    except ValueError as error:  # no UTF-8, or no path at all
        raise InputFileError(f"{str(path)!r} can't be read ({error})") from error


def output_folder(args: TrainingArguments) -> Path:
    """Where a run writes; `TrainingArguments` names a folder where a script does not, so that there always is one."""
    assert args.output_dir is not None
    return Path(args.output_dir)


def check_writable(option: str, *paths: str | Path) -> None:
    """Finds out, without leaving anything behind, whether files can be written, missing folders included.

    Args:
        option: which names them.
        paths: of the files.

    Raises:
        OutputFileError: one can't; says why.
    """
    for path in map(Path, paths):
        found = _status(option, path)
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise OutputFileError(
                f"{option}: {str(path)!r} is {_kind(found)}, so no file can be written there; name another"
            )
        if found is not None and not os.access(path, os.W_OK):
            raise OutputFileError(f"{option}: {str(path)!r} is write-protected; name another file")
        _check_folder(option, path.absolute().parent)


def check_folder_writable(option: str, folder: str | Path) -> None:
    """The same for a folder in which files are to be written.

    Raises:
        OutputFileError: it can't be written to, or something else has its name.
    """
    _check_folder(option, Path(folder).absolute())


def _check_folder(option: str, folder: Path) -> None:
    """Tries it in the nearest folder that exists: permissions alone don't tell."""
    while (found := _status(option, folder)) is None:
        folder = folder.parent
    if not stat.S_ISDIR(found.st_mode):
        raise OutputFileError(f"{option}: {str(folder)!r} is {_kind(found)}, not a folder; name another place")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputFileError(
            f"{option}: nothing can be written in {str(folder)!r} ({error.strerror}); name another place"
        ) from error


def _status(option: str, path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise OutputFileError(f"{option}: {str(path)!r} is a link to nothing; name another place") from None
        return None
    except NotADirectoryError:
        return None  # the folder above says what is wrong
    except (OSError, ValueError) as error:  # a name that is too long, or that no file can have
        why = getattr(error, "strerror", None) or error
        raise OutputFileError(f"{option}: {str(path)!r} can't be written ({why}); name another place") from error


def _kind(found: os.stat_result) -> str:
    return (
        "a folder" if stat.S_ISDIR(found.st_mode) else "a file" if stat.S_ISREG(found.st_mode) else "a device or pipe"
    )


@contextmanager
def written_together(*paths: str | Path) -> Iterator[Sequence[Path]]:
    """Gives a new path beside each file, to be written; they get the files' names when the block has ended well.

    If it has not, nothing is left: neither of the new files nor of folders that were made for them.

    Raises:
        OutputFileError: a file can't be written.
    """
    targets = [Path(path) for path in paths]
    fresh = [path.with_name(f".writing-{uuid4().hex[:12]}{path.suffix}") for path in targets]
    made: list[Path] = []
    try:
        for path in targets:
            made += _make_folder(path.parent)
        yield fresh
        for path in fresh:  # none gets its name where another then can't
            path.stat()
        check_writable("output", *targets)
        for path, target in zip(fresh, targets, strict=True):
            os.replace(path, target)
        made.clear()
    except OSError as error:
        if isinstance(error, OutputFileError):
            raise
        raise OutputFileError(f"{', '.join(map(str, targets))} can't be written: {error.strerror or error}") from error
    finally:
        for path in fresh:
            path.unlink(missing_ok=True)
        for folder in reversed(made):
            if not any(folder.iterdir()):
                folder.rmdir()


def _make_folder(folder: Path) -> list[Path]:
    """Makes a folder; returns those that did not exist, outermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]
