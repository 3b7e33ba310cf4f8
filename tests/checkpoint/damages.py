"""What can happen to a file of a checkpoint, and to every number in its JSON; done and undone."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Damage = Callable[[Path, Path], None]
"""Gets the file, and the same one in an older checkpoint."""


def flip(part: float) -> Damage:
    """Flips the lowest bit of the byte at this part of the file."""

    def damage(path: Path, older: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(len(data) - 1, int(part * len(data)))] ^= 1
        path.write_bytes(data)

    return damage


def truncate(path: Path, older: Path) -> None:
    """Half of it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path: Path, older: Path) -> None:
    """A byte more."""
    path.write_bytes(path.read_bytes() + (b"}" if path.suffix == ".json" else b"\0"))


def empty(path: Path, older: Path) -> None:
    """Nothing in it."""
    path.write_bytes(b"")


def delete(path: Path, older: Path) -> None:
    """No such file."""
    path.unlink()


def swap(path: Path, older: Path) -> None:
    """The file of an older checkpoint."""
    shutil.copy(older, path)


def directory(path: Path, older: Path) -> None:
    """A directory of that name."""
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Damage] = {
    **{f"flip at {part}": flip(part) for part in (0, 0.25, 0.5, 0.75, 1)},
    **{damage.__name__: damage for damage in (truncate, grow, empty, delete, swap, directory)},
}

WRONG_NUMBERS: list[Any] = [-1, 0, 1, 7, 10**9, 2**70, 0.5, 1e30, float("nan"), True, None, "3", [], {}]


@contextlib.contextmanager
def kept(path: Path) -> Iterator[None]:
    """Puts a file back as it was."""
    data = path.read_bytes()
    try:
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(data)


def numbers(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where in a JSON value numbers are."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(item, (*path, key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


def put(path: Path, where: tuple, number: Any) -> bool:
    """Writes another value there; whether it is another one."""
    value = json.loads(path.read_text())
    inner = value
    for key in where[:-1]:
        inner = inner[key]
    if inner[where[-1]] == number and type(inner[where[-1]]) is type(number):
        return False
    inner[where[-1]] = number
    path.write_text(json.dumps(value, indent=2) + "\n")
    return True


def same_content(a: Path, b: Path) -> bool:
    """Whether two files are equal byte for byte."""
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()
