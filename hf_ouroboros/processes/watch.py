"""Watch: every process posts what it is doing on a common board; a failure of one becomes a named error in all.

A process that raises writes its error on the board. One that is killed stops posting, and its connections break. One that
hangs is found by what its neighbours wait for. Whoever finds out first writes it down, so that all say the same.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import ConnectionLostError, DisagreementError, RankFailedError
from .awaiting import await_others
from .grid import ProcessGrid

INTERVAL = 0.2
"""Seconds between two looks at the board."""
LINGER = 3.0
"""Seconds that the main process stays for others to read why it ends."""
GRACE = 10.0
"""Seconds that a process gets to end by itself, with a traceback, before it is ended."""
# torch's communication raises plain RuntimeErrors; these words tell them from others.
_BROKEN_CONNECTION = re.compile(r"gloo/|NCCL|Connection (closed|reset)|Broken pipe|Socket|TCPStore|Timed out waiting")


class Watch:
    """One process's part; created by all processes at the same point.

    Args:
        grid: the processes.
        group: of all processes.
        doing: tells what this process is doing: (text, rank that it waits for or None).
    """

    def __init__(self, grid: ProcessGrid, group: dist.ProcessGroup, doing: Callable[[], tuple[str, int | None]]):
        self._grid = grid
        self._group = group
        self._doing = doing
        self._store = self._open_store()
        self._over = threading.Event()  # nothing is guarded; the thread waits for it between two looks
        self._over.set()
        self._raised = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> (what was posted, when it last changed)
        self._gone: list[int] = []  # ranks that this process has found to be silent
        self._guarded = 0  # how often; an error that a script has dealt with does not count in the next one
        self._posts = 0
        self._last: tuple[str, float] = "", 0.0  # what this process is doing, since when
        self.failure: RankFailedError | None = None

    def _open_store(self) -> dist.TCPStore:
        """A store of our own, on the main process: the launcher's may go away in the very moment it is needed."""
        message: list[Any] = [None]
        timeout = timedelta(seconds=min(60.0, self._grid.timeout.total_seconds()))
        if self._grid.rank == 0:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            message = [(host, store.port)]
        dist.broadcast_object_list(message, 0)
        if self._grid.rank:
            host, port = message[0]
            store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        return store

    # ---- called by the trainer ----

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Watches over what is inside; entered by all processes at the same point, and left together.

        Raises:
            RankFailedError: another process failed.
        """
        if not self._over.is_set():  # inside of another one
            yield
            return
        self._guarded += 1
        self.failure = None
        self._seen.clear()
        self._gone = []
        self._raised.clear()
        self._over.clear()
        thread = threading.Thread(target=self._run, name="ouroboros watch", daemon=True)
        thread.start()
        try:
            yield
            await_others(dist.barrier(self._group, async_op=True), self.check)
        except BaseException as error:
            cause = self._explain(error)
            if cause is error:
                raise
            raise cause from error
        finally:
            self._over.set()
            thread.join(2 * INTERVAL + 1)

    def check(self) -> None:
        """Raises what another process has posted as the failure of the run."""
        if self.failure is not None:
            raise self.failure

    def _explain(self, error: BaseException) -> BaseException:
        """What to raise instead of an error of this process: the failure of another one, if that is the cause.

        The error is posted, so that the other processes name it, too.
        """
        self._raised.set()
        if isinstance(error, DisagreementError) and error.everywhere:
            return error
        if isinstance(error, RankFailedError):
            self.failure = self.failure or error  # found out at a meeting
        if self._is_foreign(error):
            self.failure = self.failure or self._find_culprit(error)
            error = self.failure
        else:
            self._post_failure({"rank": self._grid.rank, "text": self._account(self._grid.rank, _describe(error))})
        if self._grid.rank:
            with suppress(RuntimeError):  # this process knows why it ends: nobody need wait for it to read
                self._store.set(f"read {self._guarded} {self._grid.rank}", "")
        self._linger()
        return error

    # ---- finding out ----

    def _is_foreign(self, error: BaseException | None) -> bool:
        while error is not None:
            if isinstance(error, (ConnectionLostError, RankFailedError)):
                return True
            if isinstance(error, RuntimeError) and _BROKEN_CONNECTION.search(str(error)):
                return True
            error = error.__cause__
        return False

    def _find_culprit(self, error: BaseException) -> RankFailedError:
        """Who is to blame for a connection that broke: the poster of a failure, else whoever has gone silent."""
        deadline = time.monotonic() + 4 * INTERVAL + 0.5
        while time.monotonic() < deadline:
            try:
                self._look()
            except RuntimeError:
                break
            if self.failure is not None:
                return self.failure
            time.sleep(INTERVAL / 2)
        now = time.monotonic()
        # The board is on rank 0: if nobody answers there, it is rank 0 that is gone.
        silent = [rank for rank, (_, when) in self._seen.items() if now - when > 4 * INTERVAL]
        try:
            self._store.check([self._failure_key])
        except RuntimeError:
            silent = [0]
        self._gone = silent
        culprit = silent[0] if silent else self._blocking_rank()
        text = "is gone (killed, or its connection broke)" if silent else "does not answer"
        self._post_failure({"rank": culprit, "text": self._account(culprit, f"{text}. {_describe(error)}")})
        return self.failure or RankFailedError(self._account(culprit, f"{text}. {_describe(error)}"))

    def _blocking_rank(self) -> int | None:
        """Of the living processes, one that waits for nobody: it is the one that all others wait for."""
        idle = []
        for rank, (post, _) in self._seen.items():
            entry = json.loads(post)
            if entry["waits_for"] is None and "all devices" not in entry["doing"]:
                idle.append((entry["since"], rank))
        return min(idle)[1] if idle else None

    def _account(self, rank: int | None, what: str) -> str:
        if rank is None:
            return f"a process of this run {what}"
        grid = self._grid
        place = f"rank {rank} (replica {rank // grid.num_devices}, device {rank % grid.num_devices})"
        post = self._doing()[0] if rank == grid.rank else None
        if rank in self._seen and rank != grid.rank:
            post = json.loads(self._seen[rank][0])["doing"]
        return f"{place} {what}" + (f". It was last seen {post}" if post else "")

    # ---- the board ----

    @property
    def _failure_key(self) -> str:
        return f"failure {self._guarded}"

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self._post()
                self._look()
                self._look_for_silence()
            except RuntimeError as error:  # the board, that is rank 0, is gone
                if self._over.is_set():
                    return
                self.failure = self.failure or RankFailedError(
                    self._account(0, f"is gone (killed, or its connection broke). {_describe(error)}")
                )
            if self.failure is not None:
                self._end_if_stuck()
                return
            self._over.wait(INTERVAL)

    def _post(self) -> None:
        doing, waits_for = self._doing()
        self._posts += 1
        if doing != self._last[0]:
            self._last = doing, time.time()
        entry = {"post": self._posts, "doing": doing, "waits_for": waits_for, "since": self._last[1]}
        self._store.set(f"rank {self._grid.rank}", json.dumps(entry))

    def _look(self) -> None:
        if self.failure is None and self._store.check([self._failure_key]):
            found = json.loads(self._store.get(self._failure_key))
            if found["rank"] != self._grid.rank or not self._raised.is_set():  # it may be us who hangs
                self.failure = RankFailedError(found["text"])
            self._store.set(f"read {self._guarded} {self._grid.rank}", "")
        others = [rank for rank in range(self._grid.world_size) if rank != self._grid.rank]
        keys = [f"rank {rank}" for rank in others]
        if self._store.check(keys):  # all have posted once
            for rank, post in zip(others, self._store.multi_get(keys), strict=True):
                if self._seen.get(rank, ("", 0.0))[0] != post.decode():
                    self._seen[rank] = post.decode(), time.monotonic()

    def _look_for_silence(self) -> None:
        limit = self._grid.timeout.total_seconds()
        for rank, (_, when) in self._seen.items():
            if time.monotonic() - when > limit:
                text = self._account(rank, f"has not been heard of for {limit:.0f} s (ddp_timeout)")
                self._post_failure({"rank": rank, "text": text})
                self.failure = self.failure or RankFailedError(text)

    def _post_failure(self, failure: dict[str, Any]) -> None:
        """Writes a failure down, unless another one is there: then that one counts."""
        try:
            kept = json.loads(self._store.compare_set(self._failure_key, "", json.dumps(failure)))
        except (RuntimeError, ValueError):
            return
        if kept["rank"] != self._grid.rank:
            self.failure = RankFailedError(kept["text"])

    def _linger(self) -> None:
        """The board, on rank 0, stays until the others have read it, but those that are gone; and not for long."""
        if self._grid.rank:
            return
        keys = [f"read {self._guarded} {rank}" for rank in range(1, self._grid.world_size) if rank not in self._gone]
        deadline = time.monotonic() + LINGER
        while keys and time.monotonic() < deadline and not self._store.check(keys):
            time.sleep(INTERVAL / 2)

    def _end_if_stuck(self) -> None:
        """Ends a process whose main thread waits, in a library, for something that will never come."""
        if not self._raised.wait(GRACE) and not self._over.is_set():
            print(f"hf_ouroboros, rank {self._grid.rank}: {self.failure}", file=sys.stderr, flush=True)
            os._exit(1)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
