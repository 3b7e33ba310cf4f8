"""What TRL's losses gather from other processes: nothing where a worker computes them, the replicas' numbers in the main thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


class Alone:
    """The accelerator as a loss on one stage sees it: nothing to gather.

    Args:
        device: of what the loss is computed of.
    """

    parallelism_config = None
    num_processes = 1

    def __init__(self, device: torch.device):
        self.device = device

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """The value."""
        return value

    def gather_for_metrics(self, value: torch.Tensor) -> torch.Tensor:
        """The value."""
        return self.gather(value)


class OfReplicas(Alone):
    """The accelerator as metrics over data-parallel replicas see it; in the main thread of all processes with the last stage.

    Rows that only fill up the last batch of an evaluation are left out before, so replicas may give different numbers of rows.

    Args:
        device: of what the metrics are computed of.
        accelerator: gathers tensors of one shape from the replicas.
    """

    def __init__(self, device: torch.device, accelerator: Accelerator):
        super().__init__(device)
        self._accelerator = accelerator

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """The values of all replicas, concatenated along dimension 0."""
        rows = value.detach().to(self._accelerator.device)
        rows = rows.reshape(1) if rows.dim() == 0 else rows
        counts = self._accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = self._accelerator.gather(padded).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(self.device)
