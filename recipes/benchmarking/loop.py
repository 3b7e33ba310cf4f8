"""The loop of contenders that are no Trainers: global batches in the order of the data, a clock, evaluations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler

from .clock import Clock
from .job import Job, common_arguments, muon
from .measure import gather, peak_memory_mib, steady_state
from .options import settling_updates
from .text import read_blocks
from .trainers import arguments_of


class Peer(ABC):
    """One process of a contender: its part of the model, and how it trains that.

    Args:
        job: what is trained.
        world_size: number of processes.

    Attributes:
        knows_losses: the process that knows the losses of the updates.
    """

    knows_losses = 0

    def __init__(self, job: Job, world_size: int):
        self.job, self.rank, self.world_size = job, dist.get_rank(), world_size
        self.device = torch.device("cpu") if job.options.on_cpu else torch.device(job.options.devices[self.rank])
        self.arguments = arguments_of(TrainingArguments, common_arguments(job), job.contender.settings)

    def make_optimizer(
        self, parameters: Sequence[nn.Parameter], model: PreTrainedModel, matrices: list[str]
    ) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """The optimizer that all contenders have, for these parameters, and its learning rate's schedule.

        Args:
            parameters: this process's.
            model: that they are of.
            matrices: names of those that Muon steps; empty without Muon.
        """
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(self.arguments)
        if matrices:
            optimizer_class, options = muon(self.arguments, model, matrices)
        # As Trainer does: biases and norms don't decay.
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.arguments.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = optimizer_class(groups, **options)
        return optimizer, get_scheduler(
            self.arguments.lr_scheduler_type, optimizer, self.arguments.warmup_steps, self.job.updates
        )

    @abstractmethod
    def update(self, ids: torch.Tensor) -> float | None:
        """One optimizer step on a global batch [rows, time]; the mean loss in the process that knows it."""

    @abstractmethod
    def evaluate(self, rows: torch.Tensor) -> float:
        """Mean loss over rows [rows, time], the same in all processes."""

    def busy_seconds(self) -> float | None:
        """How long this process has computed so far; None where computing can't be told from waiting."""
        return None


def run(make: Callable[[Job, int], Peer], job: Job, world_size: int) -> dict[str, Any]:
    """Trains; returns the measurements, equal in all processes.

    Args:
        make: builds this process's peer.
        job: what is trained.
        world_size: number of processes.
    """
    train, validation = read_blocks(job)
    peer, clock, losses, busy = make(job, world_size), Clock(), [], []
    clock.restart()
    for update, ids in enumerate(train.split(job.options.global_batch), start=1):
        losses.append(peer.update(ids.to(peer.device).long()))
        if not job.options.on_cpu:
            torch.cuda.synchronize()
        clock.update_ended()
        busy.append(peer.busy_seconds())
        if job.evaluate and update % job.options.eval_every == 0:
            with clock.paused():
                loss = peer.evaluate(validation.to(peer.device).long())
            clock.evaluations.append((update, clock.now(), loss))
            if job.target is not None and loss <= job.target:
                break
    losses = gather(losses)[peer.knows_losses]
    result = steady_state(job, clock) | {
        "training_loss": sum(losses) / len(losses),
        "losses": losses,
        "peak_memory_mib": peak_memory_mib(None),
    }
    if not job.evaluate:
        result["eval_loss"] = peer.evaluate(validation.to(peer.device).long())
        if job.options.on_cpu and busy[-1] is not None:
            first, last = settling_updates(job.contender), len(busy) - 2
            result["busy_shares"] = gather((busy[last] - busy[first]) / (clock.times[last] - clock.times[first]))
    return result
