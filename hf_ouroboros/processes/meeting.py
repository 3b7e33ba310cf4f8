"""Meeting: where the processes of a run compare what they know, and hear of one that refused or has left.

Everything goes over the store that the launcher gave them, key by key, and no wait is a blocking one: it works also
where processes differ in what decides which collectives run, and where one of them will never come.

Meetings are numbered, alike in all processes. At each of them a process either states its facts or says that it refused:

    number    rank 0                     rank 1
    0         facts of the options       facts of the options      compared: go on, or the same error in both
    1         facts of the model         refused: no such layer    rank 0: RankFailedError that names it
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil  # comes with accelerate
import torch
import torch.distributed as dist

from ..errors import DisagreementError, RankFailedError
from .handshake import POINT, Facts, checksum, disagreement

LINGER = 3.0
"""Seconds that a process that is about to fail stays until the others have read why."""
JOIN = timedelta(seconds=30)
"""How long a process that has already refused tries to meet the others, to tell them."""
_present: Meeting | None = None


def present() -> Meeting | None:
    """The meeting of this process; None in a run of a single process, or before processes know each other."""
    global _present
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    if _present is None or _present.founded_on is not store:
        _present = Meeting(store, dist.get_rank(), dist.get_world_size())
        _present.tell_when_it_ends()
    return _present


@contextmanager
def refusing(use_cpu: bool = False, backend: str | None = None) -> Iterator[None]:
    """Tells the other processes of an error that is raised inside, so that they do not wait for this one.

    Args:
        use_cpu: where the processes don't know each other yet: whether they will meet over CPUs.
        backend: in that case, the backend that was chosen, if one was.
    """
    try:
        yield
    except (DisagreementError, RankFailedError):
        raise  # they know
    except BaseException as error:
        meeting = present() or _join(use_cpu, backend)
        if meeting is not None:
            meeting.refuse(error)
        raise


def _join(use_cpu: bool, backend: str | None) -> Meeting | None:
    """Meets those who wait for this process, which would otherwise do so until a timeout."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "MASTER_PORT" not in os.environ or dist.is_initialized():
        return None
    device = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    with suppress(RuntimeError, ValueError):
        dist.init_process_group(
            backend or ("gloo" if device is None else dist.get_default_backend_for_device(device)), timeout=JOIN
        )
    return present()


class Meeting:
    """One process's part.

    Args:
        store: through which processes found each other.
        rank: this process.
        world_size: how many there are.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.founded_on: dist.Store | None = store  # None when this process ends
        self._store = dist.PrefixStore("hf_ouroboros", store)
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._number = 0
        self._process = os.getpid()
        self._store.set(f"who {rank}", json.dumps([_host(), self._process]))

    def agree(self, where: str, facts: Facts, timeout: timedelta, check: Callable[[], None] = lambda: None) -> None:
        """Compares facts among all processes, each of which calls this at the same point.

        Args:
            where: the point.
            facts: what this process knows.
            timeout: how long to wait for the others.
            check: raises if another process is known to have failed; called while this one waits.

        Raises:
            DisagreementError: they differ; raised by all processes.
            RankFailedError: another process refused to come here, is gone, or is late.
        """
        number, self._number = self._number, self._number + 1
        facts = {POINT: {"the point they have reached": where}, **facts}
        try:
            sums = {section: checksum(table) for section, table in facts.items()}
            entries = self._gather(f"sums {number}", sums, where, timeout, check)
            for kind in ("sums", "facts"):  # whoever has come here has read those of the meeting before
                self._store.delete_key(f"{kind} {number - 1} {self._rank}")
            if all(entry == sums for entry in entries.values()):
                return
            error: DisagreementError | RankFailedError | None = disagreement(
                where, self._gather(f"facts {number}", facts, where, timeout, check)
            )
        except RankFailedError as failure:
            error = failure
        except dist.DistError as failure:
            raise RankFailedError(
                f"rank 0 is gone (the store that it kept does not answer), at {where}. {describe(failure)}"
            ) from failure
        if error is not None:
            if isinstance(error, DisagreementError):
                error.everywhere = True
            with suppress(RuntimeError):
                self._linger(number)
            raise error

    def refuse(self, error: BaseException) -> None:
        """Tells those who come to the next meeting that this process does not."""
        if getattr(error, "_told", False):  # by an inner call
            return
        vars(error)["_told"] = True
        number, self._number = self._number, self._number + 1
        with suppress(RuntimeError):
            self._store.set(f"sums {number} {self._rank}", json.dumps({"refused": describe(error)}))
            self._linger(number)

    # ---- inside ----

    def _gather(self, key: str, own: Any, where: str, timeout: timedelta, check: Callable[[], None]) -> dict[int, Any]:
        """What every process says, by rank."""
        self._store.set(f"{key} {self._rank}", json.dumps(own))
        found = {self._rank: own}
        start, pause = time.monotonic(), 0.0005
        while True:
            for rank in self._others:
                if rank not in found and self._store.check([f"{key} {rank}"]):
                    found[rank] = json.loads(self._store.get(f"{key} {rank}"))
                    if "refused" in found[rank]:
                        raise RankFailedError(f"rank {rank} refused before {where}: {found[rank]['refused']}")
            if len(found) == len(self._others) + 1:
                return dict(sorted(found.items()))
            check()
            missing = [rank for rank in self._others if rank not in found]
            if pause > 0.02:
                self._look_for_the_lost(missing, key, where)
            if time.monotonic() - start > timeout.total_seconds():
                raise RankFailedError(
                    f"rank {missing[0]} did not come to {where} within {timeout.total_seconds():.0f} s (ddp_timeout); every "
                    "process has to make the same calls"
                )
            time.sleep(pause)
            pause = min(1.3 * pause, 0.05)

    def _look_for_the_lost(self, missing: list[int], key: str, where: str) -> None:
        for rank in missing:
            if not self._has_ended(rank) or self._store.check([f"{key} {rank}"]):  # its last words, in the very moment
                continue
            why = self._read(f"left {rank}") if self._store.check([f"left {rank}"]) else "was killed, or broke off"
            raise RankFailedError(f"rank {rank} {why}, while others waited for it at {where}")

    def _read(self, key: str) -> Any:
        return json.loads(self._store.get(key))

    def _linger(self, number: int) -> None:
        """Stays until the others have read what goes wrong: a launcher ends them as soon as one process fails."""
        self._store.set(f"read {number} {self._rank}", "")
        deadline = time.monotonic() + LINGER
        while time.monotonic() < deadline and not all(self._has_read(rank, number) for rank in self._others):
            time.sleep(0.02)

    def _has_read(self, rank: int, number: int) -> bool:
        return self._store.check([f"read {number} {rank}"]) or self._has_ended(rank)

    def _has_ended(self, rank: int) -> bool:
        if self._store.check([f"left {rank}"]):
            return True
        return self._store.check([f"who {rank}"]) and not _lives(*self._read(f"who {rank}"))

    # ---- the end of the process ----

    def tell_when_it_ends(self) -> None:
        """Has this process say so when it ends, and of which error."""
        before = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
            before(kind, error, traceback)
            self.leave(f"ended with {describe(error)}", failed=True)

        sys.excepthook = hook
        atexit.register(self._leave_for_good)

    def leave(self, how: str, failed: bool = False) -> None:
        """Says that this process ends; stays a little if others wait for it, or find out through it."""
        if os.getpid() != self._process:  # a forked child's end is not ours
            return
        with suppress(RuntimeError):
            if not self._store.check([f"left {self._rank}"]):
                self._store.set(f"left {self._rank}", json.dumps(how))
            awaited = any(self._store.check([f"sums {self._number} {rank}"]) for rank in self._others)
            if failed or awaited:
                self._linger(self._number)
            elif self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                # The store is in this process.
                deadline = time.monotonic() + LINGER
                while time.monotonic() < deadline and not self._store.check([f"left {r}" for r in self._others]):
                    time.sleep(0.02)

    def _leave_for_good(self) -> None:
        """Leaves, and lets go of the store while Python still runs."""
        global _present
        self.leave("ended")
        del self._store
        self.founded_on = _present = None


def describe(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _host() -> str:
    """Where process ids mean the same."""
    parts = [platform.node()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _lives(host: str, process: int) -> bool:
    """Whether a process is there; processes of other hosts are believed to be."""
    if host != _host():
        return True
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
