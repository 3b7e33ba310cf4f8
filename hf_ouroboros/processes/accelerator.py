"""ReplicaAccelerator: accelerate's Accelerator for a run in which several processes share their batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import recursively_apply
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from ..errors import UnsupportedOptionError
from .awaiting import await_others
from .grid import ProcessGrid


class ReplicaAccelerator(Accelerator):
    """Data goes to replicas instead of processes, and what is gathered comes from replicas.

    `over` turns the Accelerator that Trainer has made into one of these.
    """

    @staticmethod
    def over(
        accelerator: Accelerator, grid: ProcessGrid, check: Callable[[], None] = lambda: None
    ) -> ReplicaAccelerator:
        """Makes an Accelerator know the replicas; called by all processes at the same point.

        Args:
            accelerator: Trainer's.
            grid: the processes.
            check: raises if another process is known to have failed; called while this one waits.
        """
        if accelerator.dispatch_batches:
            raise UnsupportedOptionError(
                "accelerator_config dispatch_batches=True sends other rows to every process, but the processes of a "
                "replica need the same ones; leave it out"
            )
        accelerator.__class__ = ReplicaAccelerator
        accelerator.grid = grid
        accelerator.column = grid.standing_group("column", "metrics")
        accelerator.rows_left = None
        accelerator.check = check
        return accelerator

    grid: ProcessGrid
    column: dist.ProcessGroup
    check: Callable[[], None]
    # In evaluation, how many rows of the last batch of all replicas are not repetitions; None before the last batch.
    rows_left: int | None

    def prepare_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """The model as it is: the engine moves its gradients."""
        return model

    def prepare_data_loader(
        self, data_loader: DataLoader, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> DataLoader:
        """A data loader that gives every replica its own batches, and all processes of a replica the same ones.

        They stay on the CPU, where they can be compared without waiting for an accelerator; Trainer moves them when they
        are used.
        """
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return data_loader
        seeding = data_loader.worker_init_fn
        if isinstance(seeding, partial) and seeding.func is seed_worker:
            # By process, workers would draw other crops on each; the processes of a replica need the same ones.
            data_loader.worker_init_fn = partial(seed_worker, **{**seeding.keywords, "rank": self.grid.replica})
        prepared = prepare_data_loader(
            data_loader,
            self.device,
            num_processes=self.grid.replicas,
            process_index=self.grid.replica,
            split_batches=self.split_batches,
            put_on_device=False,
            rng_types=self.rng_types.copy() if self.rng_types else None,
            dispatch_batches=False,
            even_batches=self.even_batches,
            use_seedable_sampler=self.use_seedable_sampler,
            data_seed=self.dataloader_config.data_seed,
            non_blocking=self.non_blocking,
            use_stateful_dataloader=self.use_stateful_dataloader,
        )
        self._dataloaders.append(prepared)
        return prepared

    def gather(self, tensor: Any) -> Any:
        """Tensors of all replicas, concatenated along dimension 0; called by all processes with the same stages."""
        return recursively_apply(self._gather, tensor, error_on_other_type=True)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As `gather`, without the rows that were repeated to give every replica a last batch."""
        gathered = self.gather(input_data)
        if self.rows_left is None:
            return gathered
        return recursively_apply(lambda tensor: tensor[: self.rows_left], gathered)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Pads tensors at their end to the longest among the replicas."""
        return recursively_apply(lambda t: self._pad(t, dim, pad_index), tensor, error_on_other_type=True)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.grid.replicas)]
        await_others(dist.all_gather(parts, tensor, group=self.column, async_op=True), self.check)
        return torch.cat(parts)

    def _pad(self, tensor: torch.Tensor, dim: int, value: int) -> torch.Tensor:
        if dim >= tensor.dim():
            return tensor
        length = torch.tensor([tensor.shape[dim]], device=tensor.device)
        longest = int(self._gather(length).max())
        if longest == tensor.shape[dim]:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = longest
        padded = tensor.new_full(shape, value)
        padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        return padded
