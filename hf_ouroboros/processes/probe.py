"""What the stages put out, found by running a few tokens through them, from process to process."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..partition import Partition, select
from .grid import ProcessGrid
from .wires import HiddenSpec


@torch.no_grad()
def hidden_specs(
    partition: Partition, grid: ProcessGrid, row: dist.ProcessGroup, autocast_dtype: torch.dtype | None
) -> list[HiddenSpec]:
    """Shape and dtype of every stage's output but the last one's; called by all processes at the same point.

    Args:
        partition: the split model; only the stages of this process need weights.
        grid: the processes.
        row: a group of this replica's processes.
        autocast_dtype: dtype of mixed precision; None for none.
    """
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    hidden: torch.Tensor | None = None
    specs: list[HiddenSpec] = []
    for stage, device_index in zip(partition.stages[:-1], partition.plan.placement, strict=False):
        message = [None]
        if device_index == grid.device_index:
            was_training = stage.training
            stage.eval()
            with torch.autocast(grid.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                given = None if hidden is None else hidden.to(grid.device)
                hidden = stage(select(stage.family, batch, grid.device), given).cpu()
            stage.train(was_training)
            message = [hidden]
        dist.broadcast_object_list(message, grid.rank_of(device_index), group=row)
        hidden = message[0]
        specs.append(HiddenSpec(tuple(hidden.shape[2:]), hidden.dtype))
    return specs
