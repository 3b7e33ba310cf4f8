"""What repeats does not grow: updates, evaluations and engines over processes, as in threads."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import ProcessRun
from helpers import Batch, Case, tiny_gpt2
from rig import in_processes
from trainer_helpers import EVERY
from trainer_runs import train_part
from transformers import GPT2LMHeadModel

from hf_ouroboros.engine.losses import LossFunction
from hf_ouroboros.memory_use import peak_memory

MIB = 2**20
WIDTH, ROWS, TIME = 16, 64, 16  # a large hidden state that costs little to compute
MESSAGE = ROWS * TIME * WIDTH * 4  # its bytes


@dataclass(frozen=True)
class LargeCase(Case):
    """Batches so large that a message which is kept for ever would show in a process's size."""

    def model(self) -> GPT2LMHeadModel:
        """The model before it is split."""
        return tiny_gpt2(self.tied, self.layers, n_embd=WIDTH, n_positions=TIME)

    def loss(self, replicas: int = 1) -> LossFunction:
        """The mean over tokens."""
        return lambda logits, batch, targets: logits.float().square().mean() * replicas

    def batches(self, update: int) -> list[Batch]:
        """Always the same batch."""
        return [{"input_ids": torch.arange(ROWS * TIME).reshape(ROWS, TIME) % 19}] * self.updates[update]

    def targets(self, batches: Any) -> None:
        """Not needed."""


def sizes() -> dict[str, int]:
    """What of this process could grow."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return {
        "resident": peak_memory().resident or 0,
        "threads": len(list(Path("/proc/self/task").iterdir()))
        if os.path.exists("/proc")
        else threading.active_count(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())) if os.path.exists("/proc") else 0,
        "tensors": len(tensors),
        "tensor bytes": sum(t.untyped_storage().nbytes() for t in tensors if not t.is_meta),
    }


def train_long(rank: int, world_size: int, case: Case, schedule: str, early: int) -> list[dict[str, int]]:
    """Sizes after `early` updates and after all of them."""
    run = ProcessRun(case, schedule, rank, world_size, 1)
    found = []
    for u in range(len(case.updates)):
        run.update(u)
        if u + 1 in (early, len(case.updates)):
            run.engine.synchronize()
            found.append(sizes())
    run.engine.close()
    return found


def train_often(rank: int, world_size: int, case: Case, engines: int) -> list[dict[str, int]]:
    """Sizes after each of some engines, which settle as the Trainer's do at the end."""
    found = []
    for _ in range(engines):
        run = ProcessRun(case, "pipelined", rank, world_size, 1)
        run.train({len(case.updates) - 1: "state"})
        del run
        found.append(sizes())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "stages", "schedule"),
    [(2, 3, "1f1b"), (3, 4, "pipelined"), *([(2, 3, "pipelined")] if EVERY else [])],
)
def test_500_updates_over_processes_do_not_grow(world_size: int, stages: int, schedule: str) -> None:
    case = LargeCase(stages=stages, layers=stages - 1, devices=world_size, updates=(1,) * 500, optimizer="plain sgd")
    for rank, (early, late) in enumerate(in_processes(world_size, train_long, world_size, case, schedule, 100)):
        growth = {key: late[key] - early[key] for key in early}
        assert (growth["threads"], growth["descriptors"]) == (0, 0), (rank, growth)
        assert growth["tensors"] <= 10 and growth["tensor bytes"] <= 4 * MESSAGE, (rank, growth)
        # Kept messages would make 400 of them; the allocator may keep a few MiB for itself.
        assert growth["resident"] < 8 * MIB < 400 * MESSAGE / 3, (rank, growth)


@pytest.mark.slow
def test_engines_over_processes_do_not_grow() -> None:
    case = LargeCase(stages=3, layers=4, devices=2, updates=(1,) * 4)
    for rank, found in enumerate(in_processes(2, train_often, 2, case, 4)):
        for key in ("threads", "descriptors", "tensors", "tensor bytes"):
            assert found[-1][key] == found[1][key], (rank, key, found)


def train_trainers(rank: int, folder: str, trainers: int) -> list[dict[str, int]]:
    """Sizes after each of some trainers that train, evaluate, save and resume."""
    options = {"num_stages": 3, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    found = []
    for i in range(trainers):
        run = {"options": {**options, "save_strategy": "steps"}, "name": f"out{i}"}
        train_part(rank, folder, [run, {**run, "resume": f"{folder}/out{i}/checkpoint-1"}])
        found.append(sizes())
    return found


@pytest.mark.slow
def test_trainers_over_processes_do_not_grow(tmp_path: Path) -> None:
    for rank, found in enumerate(in_processes(2, train_trainers, str(tmp_path), 3)):
        for key in ("threads", "descriptors", "tensors", "tensor bytes"):
            assert found[-1][key] == found[1][key], (rank, key, found)
