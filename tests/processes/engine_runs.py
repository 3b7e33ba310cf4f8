"""A complete run of the engine over several processes, and its result put together as if it were one."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import torch
from helpers import Case, Run, clone, oracle
from rig import in_processes

from hf_ouroboros.engine.core import Engine
from hf_ouroboros.processes.grid import ProcessGrid
from hf_ouroboros.processes.probe import boundary_specs
from hf_ouroboros.processes.process_parts import parts_of_process
from hf_ouroboros.schedules import SCHEDULES


class ProcessRun(Run):
    """As `Run`, for the device of this process; `rank` of a world with `replicas` replicas."""

    def __init__(self, case: Case, schedule: str, rank: int, world_size: int, replicas: int):
        self.grid = ProcessGrid(rank, world_size, replicas, torch.device("cpu"), timedelta(seconds=60))
        super().__init__(case, schedule)

    def make_engine(self, partition: Any, settings: Any) -> Engine:
        specs = boundary_specs(partition, self.grid, self.grid.standing_group("row", "set-up"), settings.autocast_dtype)
        self.partition = partition
        loss = self.case.loss(self.grid.replicas)  # as Trainer scales it: the mean of all is that of the whole batch
        parts = parts_of_process(self.grid, partition.plan, settings.micro_batches, specs)
        return Engine(partition, self.optimizer, loss, settings, None, parts)

    def update(self, u: int, look: str | None = None) -> None:
        """Each replica has its rows of every micro-batch."""
        super().update(u, look)

    def batch(self, batch: dict) -> dict:
        share = len(batch["input_ids"]) // self.grid.replicas
        return {k: v[self.grid.replica * share :][:share] for k, v in batch.items()}

    def result(self) -> dict[str, Any]:
        """What this process knows at the end."""
        owned = {
            name: p
            for k, d in enumerate(self.partition.plan.placement)
            if d == self.grid.device_index
            for name, p in self.partition.owned(k).items()
        }
        return {
            "weights": {name: p.detach().clone() for name, p in owned.items()},
            "optimizer": {name: clone(self.optimizer.state[p]) for name, p in owned.items()},
            "ticks": self.ticks,
            "losses": self.losses,
            "grad_norms": self.grad_norms,
        }


def run_part(rank: int, world_size: int, cases: list[tuple[Case, str, dict]], replicas: int) -> list[dict]:
    """The part of one process in some runs, one after the other."""
    return [
        ProcessRun(case, schedule, rank, world_size, replicas).train(looks).result() for case, schedule, looks in cases
    ]


def whole(parts: list[dict], devices: int) -> dict[str, Any]:
    """The results of the processes of a run as one."""
    first = parts[0]
    for part in parts:
        assert (part["ticks"], part["losses"]) == (first["ticks"], first["losses"])
        assert part["grad_norms"] == first["grad_norms"]
    for key in ("weights", "optimizer"):
        for i, part in enumerate(parts[devices:]):
            assert part[key].keys() == parts[i % devices][key].keys()
    merged = {key: {n: v for part in parts[:devices] for n, v in part[key].items()} for key in ("weights", "optimizer")}
    return {**first, **merged}


def reference_result(case: Case, schedule: str, looks: dict) -> dict[str, Any]:
    """The same from the oracle, which knows of schedules only whether they delay."""
    rule = "reference"
    if SCHEDULES[schedule].is_synchronous:
        rule = f"reference {'1f1b' if case.scale is None else schedule}"
    run = oracle(case, rule, looks)
    names = {id(p): n for n, p in run.model.named_parameters()}
    return {
        "weights": {n: p.detach() for n, p in run.model.named_parameters()},
        "optimizer": {names[id(p)]: state for p, state in run.optimizer.state.items()},
        "ticks": run.ticks,
        "losses": run.losses,
        "grad_norms": run.grad_norms,
    }


def run_all(world_size: int, cases: list[tuple[Case, str, dict]], replicas: int = 1) -> list[dict]:
    """Results of runs over processes."""
    parts = in_processes(world_size, run_part, world_size, cases, replicas)
    return [whole([part[i] for part in parts], world_size // replicas) for i in range(len(cases))]


def with_devices(case: Case, devices: int) -> Case:
    """The case on so many devices."""
    return dataclasses.replace(case, devices=devices)
