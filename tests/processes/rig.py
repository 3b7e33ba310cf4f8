"""Starts a function in several processes that know each other over gloo on loopback, with a time limit."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# One server imports the libraries once; every process of every test is forked from it.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "torch.distributed", "hf_ouroboros.trainer", "helpers"])


class RankFailed(AssertionError):
    """A process of a test raised, died, or did not finish."""


def in_processes(world_size: int, target: Callable[..., Any], *args: Any, limit: float = 120.0) -> list[Any]:
    """What `target(rank, *args)` returns in each of the processes, by rank.

    Raises:
        RankFailed: with the traceback of the first process that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (rank, world_size, str(Path(folder) / "store"), sender, target, args)
            processes.append(context.Process(target=_main, args=arguments, daemon=True))
            processes[-1].start()
            sender.close()
            pipes.append(receiver)
        deadline = time.monotonic() + limit
        try:
            results: dict[int, Any] = {}
            while len(results) < world_size:
                waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
                ready = multiprocessing.connection.wait(list(waiting), timeout=deadline - time.monotonic())
                if not ready:
                    raise RankFailed(f"ranks {sorted(waiting.values())} did not finish within {limit} s")
                for pipe in ready:
                    try:
                        failed, value = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        raise RankFailed(f"rank {waiting[pipe]} died") from None
                    if failed:
                        raise RankFailed(f"rank {waiting[pipe]}:\n{value}")
                    results[waiting[pipe]] = value
            return [results[rank] for rank in range(world_size)]
        finally:
            for process in processes:
                process.join(timeout=5 if len(results) == world_size else 0.2)
                process.kill()


def _main(rank: int, world_size: int, store: str, sender: Any, target: Callable, args: tuple) -> None:
    import faulthandler

    import torch
    import torch.distributed as dist

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
        sender.send_bytes(pickle.dumps((False, value)))  # plain bytes: torch would send tensors as shared memory
    except BaseException:
        sender.send_bytes(pickle.dumps((True, traceback.format_exc())))
    finally:
        sender.close()
        os._exit(0)
