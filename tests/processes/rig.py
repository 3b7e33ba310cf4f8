"""Starts a function in several processes that know each other over gloo on loopback, with a time limit."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

# One server imports `preloaded` once; every process of every test is forked from it.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["preloaded"])


def forked(target: Callable[..., Any], *args: Any) -> BaseProcess:
    """A process that ends with this one, not started yet, forked from the server.

    The server is started with this process's path: without it, it would find no module of the tests, and say nothing.
    """
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        multiprocessing.forkserver.ensure_running()
    return context.Process(target=target, args=args, daemon=True)


class RankFailed(AssertionError):
    """A process of a test raised, died, or did not finish."""


def in_processes(world_size: int, target: Callable[..., Any], *args: Any, limit: float = 120.0) -> list[Any]:
    """What `target(rank, *args)` returns in each of the processes, by rank.

    Raises:
        RankFailed: with the traceback of the first process that failed.
    """
    results: dict[int, Any] = {}
    for rank, result in _outcomes(world_size, target, args, limit):
        if isinstance(result, Ended):
            raise RankFailed(f"rank {rank} {result.how}:\n{result.text}")
        results[rank] = result
    return [results[rank] for rank in range(world_size)]


def ends_of(
    world_size: int, target: Callable[..., Any], *args: Any, limit: float = 60.0, never: int | None = None
) -> list[Any]:
    """How each process ended, by rank: an `Ended` where it failed, else what `target(rank, *args)` returned.

    `never` is a rank that is not expected to end.
    """
    ends = dict.fromkeys(range(world_size))
    for rank, result in _outcomes(world_size, target, args, limit):
        ends[rank] = result
        if all(end is not None or rank == never for rank, end in ends.items()):
            break
    return list(ends.values())


@dataclass(frozen=True)
class Ended:
    """A process that failed: "raised" and its traceback, or "died" and what it had printed to stderr."""

    how: str
    text: str


def _outcomes(world_size: int, target: Callable[..., Any], args: tuple, limit: float) -> Iterator[tuple[int, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = {}, []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (rank, world_size, str(Path(folder) / "store"), sender, target, args)
            processes.append(forked(_main, *arguments))
            processes[-1].start()
            sender.close()
            pipes[receiver] = rank
        deadline = time.monotonic() + limit
        try:
            while pipes:
                ready = multiprocessing.connection.wait(list(pipes), timeout=deadline - time.monotonic())
                if not ready:
                    raise RankFailed(f"ranks {sorted(pipes.values())} did not end within {limit} s")
                for pipe in ready:
                    rank = pipes.pop(pipe)
                    try:
                        yield rank, pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        yield rank, Ended("died", _errors_of(folder, rank).read_text())
            for process in processes:
                process.join(timeout=5)
        finally:
            for process in processes:
                process.kill()


def _errors_of(folder: str, rank: int) -> Path:
    return Path(folder) / f"stderr-{rank}"


def _main(rank: int, world_size: int, store: str, sender: Any, target: Callable, args: tuple) -> None:
    import faulthandler

    import torch
    import torch.distributed as dist

    sys.stderr = _errors_of(str(Path(store).parent), rank).open("w", buffering=1)
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo", f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        value = target(rank, *args)
        dist.barrier()
    except BaseException:
        value = Ended("raised", traceback.format_exc())
    try:
        sender.send_bytes(pickle.dumps(value))  # plain bytes: torch would send tensors as shared memory
        sender.close()
    finally:
        os._exit(0)
