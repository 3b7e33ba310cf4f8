"""One run at a time saves in a folder: a lock file that says who, and that outlives nobody.

The holder proves every few seconds that it lives. On its own host (and in its own container) others can ask the operating
system; elsewhere they watch the file for a while. A lock whose holder is dead is taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from transformers.utils import logging

from ..errors import OutputFolderError

LOCK_FILE = "_ouroboros_run.lock"  # Trainer pushes no files that begin so
BEAT = 5.0
"""Seconds between two signs of life."""
SILENCE = 30.0
"""Seconds without one after which a holder that can't be asked counts as dead."""

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Args:
        host: name of the machine.
        place: what else tells whether process ids mean the same: the machine's boot, and the container.
        pid: the process.
        started: when the process began, in the clock ticks of its machine; None where that is not known.
        since: when the lock was taken, as text.
        token: no other lock has it.
    """

    host: str
    place: str
    pid: int
    started: int | None
    since: str
    token: str

    @classmethod
    def here(cls) -> Holder:
        """This process, with a new token."""
        pid = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(socket.gethostname(), _place(), pid, _started(pid), since, secrets.token_hex(8))

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None where only its signs of life could tell."""
        if (self.host, self.place) != (socket.gethostname(), _place()) or os.name != "posix":
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return _started(self.pid) == self.started if self.started is not None else True


class FolderLock:
    """Holds a folder from entering to leaving the context.

    Args:
        folder: made if it does not exist.

    Raises:
        OutputFolderError: another run holds it, or it can't be written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._path = self.folder / LOCK_FILE
        self._me = Holder.here()
        self._left = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> FolderLock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            silent = self._watch()
            with _one_at_a_time(self.folder):
                self._take(silent)
        except OSError as error:
            raise OutputFolderError(
                f"output_dir={str(self.folder)!r} can't be written: {error}; choose another output_dir"
            ) from error
        self._beating = threading.Thread(target=self._beat, name="ouroboros lock", daemon=True)
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._beating is not None:
            self._beating.join()
        with contextlib.suppress(OSError):
            if self._is_mine():
                self._path.unlink()

    def check(self) -> None:
        """Makes sure that nobody has taken over, as after a time in which this process was stopped.

        Raises:
            OutputFolderError: somebody has.
        """
        if self._is_mine():
            return
        with _one_at_a_time(self.folder):
            if not self._path.exists():  # removed by hand
                self._create()
                return
        raise OutputFolderError(
            f"output_dir={str(self.folder)!r} was taken over by {_described(_read(self._path))}, as this run had given no "
            "sign of life; it saves no more"
        )

    # ---- inside ----

    def _watch(self) -> Holder | None:
        """Waits until it is known whether the present holder lives; it, if it gives no sign of life.

        Raises:
            OutputFolderError: it lives.
        """
        holder, sign = _read(self._path), _sign(self._path)
        deadline = time.monotonic() + SILENCE
        if sign is not None and (holder is None or holder.is_alive() is None):
            logger.warning(f"{self._path}: waiting {SILENCE:.0f} s for a sign of life of {_described(holder)}")
        while sign is not None:
            alive = None if holder is None else holder.is_alive()
            if alive is False or time.monotonic() > deadline:
                return holder
            if alive or _sign(self._path) not in (sign, None):
                raise self._refusal(holder or _read(self._path))
            time.sleep(min(0.5, SILENCE / 10))
            if _sign(self._path) is None:
                return None  # it has ended
        return None

    def _take(self, silent: Holder | None) -> None:
        present = _read(self._path)
        if not self._path.exists():
            self._create()
            return
        if present is not None and (silent is None or present.token != silent.token):
            raise self._refusal(present)  # somebody was faster
        # Not removed first: then two could do so one after the other, the second one removing the first one's.
        os.replace(self._written(), self._path)
        if (present is None or present.is_alive() is None) and not self._stays_mine():
            raise self._refusal(_read(self._path))

    def _create(self) -> None:
        """Makes the lock, with its content, in one step."""
        mine = self._written()
        try:
            os.link(mine, self._path)
        except FileExistsError:
            raise self._refusal(_read(self._path)) from None
        except OSError:  # a file system without links
            with open(self._path, "x", encoding="utf-8") as file:
                file.write(mine.read_text(encoding="utf-8"))
        finally:
            mine.unlink()

    def _written(self) -> Path:
        """The lock's content in a file aside."""
        for left in self.folder.glob(f"{LOCK_FILE}.*"):  # by a process that was killed here
            left.unlink(missing_ok=True)
        mine = self._path.with_name(f"{LOCK_FILE}.{self._me.token}")
        mine.write_text(json.dumps(asdict(self._me)), encoding="utf-8")
        return mine

    def _stays_mine(self) -> bool:
        """Whether nobody on another host, who found the same silent holder, was a little later."""
        time.sleep(min(1.0, SILENCE / 10))
        return self._is_mine()

    def _is_mine(self) -> bool:
        holder = _read(self._path)
        return holder is not None and holder.token == self._me.token

    def _beat(self) -> None:
        while not self._left.wait(BEAT):
            with contextlib.suppress(OSError):
                if self._is_mine():
                    os.utime(self._path)

    def _refusal(self, holder: Holder | None) -> OutputFolderError:
        return OutputFolderError(
            f"output_dir={str(self.folder)!r} is in use: {_described(holder)} saves there. Wait until that run has ended, "
            f"end it, or choose another output_dir (if it does not run any more, remove {self._path})"
        )


def _described(holder: Holder | None) -> str:
    if holder is None:
        return "another run"
    own = "this process" if holder.pid == os.getpid() and holder.is_alive() else f"process {holder.pid}"
    return f"{own} on {holder.host} (since {holder.since})"


def _read(path: Path) -> Holder | None:
    """The holder; None if there is none, or the file says nothing (yet)."""
    try:
        holder = Holder(**json.loads(path.read_text(encoding="utf-8")))
        return holder if type(holder.pid) is int and 0 < holder.pid < 2**31 else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _sign(path: Path) -> tuple[int, int] | None:
    """What changes with every sign of life; None without a lock."""
    try:
        with open(path, "rb") as file:  # opening it has network file systems look anew
            found = os.fstat(file.fileno())
            return found.st_mtime_ns, found.st_ino
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """When a process began, as Linux counts; None elsewhere, or if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _place() -> str:
    """The boot of the machine and the container, where Linux tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Among the processes of this host; the system lets go of it when a process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):  # not everywhere
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
