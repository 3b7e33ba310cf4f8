"""The contender `fsdp`: FSDP2, every process with a part of every layer and with rows of its own.

What Trainer does with `fsdp="full_shard"` and version 2: every layer is a group of parameters (those that
`_no_split_modules` names), everything else another one. A group is gathered before it is needed in a forward and once more
in the backward, and given away behind it; gradients are averaged in an update's last backward only, until when every process
keeps those of the whole model. Collectives over gloo do not overlap with computing, those over NCCL do.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from .contenders import ContenderError
from .job import Job, build_model, muon_matrices
from .loop import Peer


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers by which Trainer, too, would group the parameters of a model.

    Raises:
        ContenderError: the model names none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ContenderError(
            f"{type(model).__name__} names no layers (_no_split_modules), by which fsdp would group its parameters; leave fsdp "
            "out for this --model_type"
        )
    return found


class Sharded(Peer):
    """This process's part of every parameter, and its share of the rows."""

    def __init__(self, job: Job, world_size: int):
        super().__init__(job, world_size)
        model = build_model(job)
        matrices = muon_matrices(model) if job.options.optimizer == "muon" else []
        model.config.use_cache = False  # as Trainer does
        self.model = model.to(self.device).train()
        mesh = init_device_mesh(self.device.type, (world_size,))  # by default it would be of accelerators, used or not
        for module in (*layers_of(model), model):
            fully_shard(module, mesh=mesh)
        if job.options.on_cpu:  # gloo sums, and does not average
            model.set_force_sum_reduction_for_comms(True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer, self.lr_scheduler = self.make_optimizer(self.parameters, model, matrices)

    def update(self, ids: torch.Tensor) -> float:
        """See `Peer.update`; all processes know the loss."""
        own = self._share(ids)
        total = torch.zeros((), device=self.device)
        for number, rows in enumerate(own, start=1):
            self.model.set_requires_gradient_sync(number == len(own))
            loss = self._loss(rows) / len(own)
            loss.backward()
            total += loss.detach()
        if self.arguments.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.arguments.max_grad_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return self._mean(total)

    @torch.no_grad()
    def evaluate(self, rows: torch.Tensor) -> float:
        """See `Peer.evaluate`."""
        return self._mean(torch.stack([self._loss(part) for part in self._share(rows)]).mean())

    def _share(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """This process's micro-batches of whole global batches."""
        return list(rows.split(self.job.rows_per_micro_batch)[self.rank :: self.world_size])

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def _mean(self, value: torch.Tensor) -> float:
        """The mean over all processes."""
        dist.all_reduce(value)
        return value.item() / self.world_size
