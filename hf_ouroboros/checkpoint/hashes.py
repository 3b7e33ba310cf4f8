"""SHA-256 of files: in a thread of its own while a checkpoint is still being written, on several when it is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

READERS = 4
PIECE_BYTES = 2**20


@dataclass(frozen=True)
class FileDigest:
    """What a manifest knows of a file.

    Args:
        bytes: its size.
        sha256: of its content, in hexadecimal digits.
    """

    bytes: int
    sha256: str


def digest_of(path: Path, durable: bool = False) -> FileDigest:
    """Reads a file.

    Args:
        path: the file.
        durable: whether to have the operating system write it out, too.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
        if durable:
            os.fsync(file.fileno())
    return FileDigest(size, digest.hexdigest())


def digests_of(directory: Path, names: Iterable[str]) -> dict[str, FileDigest | OSError]:
    """The files of a directory, several at a time; the error for those that can't be read."""

    def read(name: str) -> FileDigest | OSError:
        try:
            return digest_of(directory / name)
        except OSError as error:
            return error

    names = list(names)
    with ThreadPoolExecutor(READERS, thread_name_prefix="ouroboros hashes") as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


class FileHashes:
    """Hashes the files of a checkpoint, and has them written out, in a thread while others are still being made.

    Args:
        directory: of the checkpoint.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ouroboros hashes")
        self._pending: dict[str, Future[FileDigest]] = {}

    def add(self, names: Iterable[str] | None = None) -> None:
        """Takes files that are complete and won't change any more; None for all that are there."""
        for name in files_in(self.directory) if names is None else names:
            if name not in self._pending:
                self._pending[name] = self._pool.submit(digest_of, self.directory / name, durable=True)

    def results(self) -> Mapping[str, FileDigest]:
        """Waits for all files taken so far."""
        return {name: future.result() for name, future in self._pending.items()}

    def close(self) -> None:
        """Ends the thread; what it has not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)


def files_in(directory: Path) -> list[str]:
    """The files in a directory and below, by names relative to it; not those that begin with a dot."""
    found = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
