"""Numbers of one run: throughput of the steady state, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from hf_ouroboros.memory_use import peak_memory

from .clock import Clock
from .job import Job
from .options import settling_updates


def steady_state(job: Job, clock: Clock) -> dict[str, Any]:
    """Throughput over whole updates, without the first ones and without the last, which empties the pipeline.

    Memory growth is that of every process's resident size over the second half of the updates.

    In runs that are evaluated it is the throughput of all of the run, and the evaluations are there too.
    """
    if job.evaluate:
        tokens = job.options.tokens_per_update * len(clock.times)
        return {"tokens_per_second": tokens / clock.times[-1], "evaluations": clock.evaluations}
    first, last = settling_updates(job.contender), len(clock.times) - 2
    seconds = clock.times[last] - clock.times[first]
    return {
        "tokens_per_second": job.options.tokens_per_update * (last - first) / seconds,
        "cold_start_seconds": clock.times[first],
        "memory_growth_mib": gather((clock.memory[last] - clock.memory[len(clock.memory) // 2]) / 2**20),
    }


def peak_memory_mib(devices: Sequence[str] | None) -> list[float]:
    """Peak memory: of every process where devices are processes, of every accelerator, of the process on CPU.

    Args:
        devices: the devices of this only process; None where every device has a process.
    """
    if devices is not None and not devices[0].startswith("cpu"):
        return [torch.cuda.max_memory_allocated(device) / 2**20 for device in devices]
    used = peak_memory()
    peak = (used.peak_resident or 0) if used.peak_cuda is None else used.peak_cuda
    return gather(peak / 2**20)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank; of this one, where it is alone."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
