"""Runs a contender in processes of its own, with a time limit; whatever happens, none of them is left behind.

All are forked from one server that has imported the libraries, so that a run starts at once and remembers nothing of
the runs before it.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from .job import Job
from .pipelines import PIPELINES

GRACE = 5.0
"""Seconds that the others have to end, and to say why, after one process failed."""
STACK = 1.0
"""Seconds to write down what a process that is late is doing."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hf_ouroboros.trainer", "torch.distributed.pipelining", "torch.distributed.fsdp"])


class RunFailed(RuntimeError):
    """A contender raised, died, or took too long; the message says which."""


Runner = Callable[[Job, int], dict[str, Any]]
"""What every process of a run does, of how many; gives the measurements, equal in all of them."""


def run(job: Job, runner: Runner | None = None) -> dict[str, Any]:
    """The measurements of one run.

    Args:
        job: the run.
        runner: what to do; None for what the contender does.

    Raises:
        RunFailed: with the words of the process that failed first.
    """
    count = len(job.options.devices) if job.contender.in_processes else 1
    job.folder.mkdir(parents=True, exist_ok=True)
    for leftover in [job.folder / "store", job.folder / "result.json", *(_error(job, rank) for rank in range(count))]:
        leftover.unlink(missing_ok=True)
    processes = [_context.Process(target=_main, args=(rank, count, job, runner), daemon=True) for rank in range(count)]
    try:
        for process in processes:
            process.start()
        _await(processes, job)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    return json.loads((job.folder / "result.json").read_text(encoding="utf-8"))


def _await(processes: list[BaseProcess], job: Job) -> None:
    deadline = time.monotonic() + job.options.time_limit
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            late = sorted(running.values())
            for rank in late:
                os.kill(processes[rank].pid, signal.SIGUSR1)  # its stack, into its log
            wait(list(running), timeout=STACK)
            raise RunFailed(
                f"rank {', '.join(map(str, late))} did not end within {job.options.time_limit:g} s; for what they were "
                f"doing see {_log(job, late[0])}"
            )
        failed = [rank for rank in (running.pop(sentinel) for sentinel in ended) if _exit_code(processes[rank])]
        if failed:
            wait(list(running), timeout=GRACE)
            raise RunFailed(f"rank {failed[0]} {_last_words(job, failed[0], processes[failed[0]])}")


def _exit_code(process: BaseProcess) -> int:
    process.join()
    return process.exitcode or 0


def _last_words(job: Job, rank: int, process: BaseProcess) -> str:
    if _error(job, rank).exists():
        return f"raised {_error(job, rank).read_text(encoding='utf-8')}"
    if process.exitcode < 0:
        return f"was ended by {signal.Signals(-process.exitcode).name}"
    return f"ended with exit code {process.exitcode}, see {_log(job, rank)}"


def _log(job: Job, rank: int) -> Path:
    return job.folder / f"rank{rank}.log"


def _error(job: Job, rank: int) -> Path:
    return job.folder / f"rank{rank}.error"


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _runner(job: Job) -> Runner:
    from . import loop, peers, sharded, trainers

    if job.contender.kind in PIPELINES:
        return partial(loop.run, peers.Pipelined)
    if job.contender.kind == "fsdp":
        return partial(loop.run, sharded.Sharded)
    return trainers.run


def _main(rank: int, count: int, job: Job, runner: Runner | None) -> None:
    """One process of a run."""
    log = _log(job, rank).open("w")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    faulthandler.register(signal.SIGUSR1, file=log)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        logging.set_verbosity_error()
        on_cpu = job.options.on_cpu
        # One core per device: a process of threads shares its cores among its devices.
        torch.set_num_threads(len(job.options.devices) if job.contender.is_ours and count == 1 else 1)
        if job.contender.in_processes:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, but the store below is used
            if sys.platform == "linux":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            if not on_cpu:
                torch.cuda.set_device(rank)
            store = dist.FileStore(str(job.folder / "store"), count)
            dist.init_process_group("gloo" if on_cpu else "nccl", store=store, rank=rank, world_size=count)
        result = {"contender": job.contender.label, **(runner or _runner(job))(job, count)}
        if rank == 0:
            (job.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException as error:
        _error(job, rank).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
