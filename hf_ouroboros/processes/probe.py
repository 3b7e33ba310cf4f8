"""What the stages put out, found by running a few tokens through them, from process to process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UnsupportedModelError
from ..partition import Boundary, Partition, select, to_device
from ..partition.meta import probe_inputs
from .channels import BoundarySpec, TensorSpec
from .grid import ProcessGrid

SHAPES = ({"batch": 2, "time": 9, "decoder": 5}, {"batch": 3, "time": 11, "decoder": 7})
"""Two, so that a dimension tells whether it depends on the batch."""

PRODUCTS = (("batch",), ("time",), ("batch", "time"), ("decoder",), ("batch", "decoder"))


@torch.no_grad()
def boundary_specs(
    partition: Partition, grid: ProcessGrid, row: dist.ProcessGroup, autocast_dtype: torch.dtype | None
) -> list[BoundarySpec]:
    """Shapes and dtypes of every stage's output but the last one's; called by all processes at the same point.

    Args:
        partition: the split model; only the stages of this process need weights.
        grid: the processes.
        row: a group of this replica's processes.
        autocast_dtype: dtype of mixed precision; None for none.

    Raises:
        UnsupportedModelError: a shape depends on the batch in another way than its numbers of rows and tokens.
    """
    outputs = [_outputs(partition, grid, row, autocast_dtype, sizes) for sizes in SHAPES]
    specs = [
        BoundarySpec(
            {
                name: TensorSpec(
                    _sizes(partition, name, tuple(small[name].shape), tuple(large[name].shape)),
                    small[name].dtype,
                )
                for name in small
            }
        )
        for small, large in zip(*outputs, strict=True)
    ]
    return with_gradients(specs, partition)


def with_gradients(specs: Sequence[BoundarySpec], partition: Partition) -> list[BoundarySpec]:
    """What stages put out, and of which of it a gradient is sent back, as the parameters are frozen now."""
    return [
        BoundarySpec(
            {
                name: replace(spec, trained=stage.trains(name, torch.empty((), dtype=spec.dtype, device="meta")))
                for name, spec in boundary.tensors.items()
            }
        )
        for boundary, stage in zip(specs, partition.stages[1:], strict=True)
    ]


def _outputs(
    partition: Partition,
    grid: ProcessGrid,
    row: dist.ProcessGroup,
    autocast_dtype: torch.dtype | None,
    sizes: Mapping[str, int],
) -> list[Boundary]:
    batch = probe_inputs(partition.model, sizes["batch"], sizes["time"])
    state: Any = None
    found: list[Boundary] = []
    for stage, device_index in zip(partition.stages[:-1], partition.plan.placement, strict=False):
        message: list[Boundary | None] = [None]
        if device_index == grid.device_index:
            was_training = stage.training
            stage.eval()
            with torch.autocast(grid.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                given = None if state is None else to_device(state, grid.device)
                state = stage(select(stage, batch, grid.device), given)
            stage.train(was_training)
            message = [to_device(state, torch.device("cpu"))]
        dist.broadcast_object_list(message, grid.rank_of(device_index), group=row)
        state = message[0]
        found.append(state)
    return found


def _sizes(
    partition: Partition, name: str, small: tuple[int, ...], large: tuple[int, ...]
) -> tuple[int | tuple[str, ...], ...]:
    sizes: list[int | tuple[str, ...]] = []
    for pair in zip(small, large, strict=True):
        if pair[0] == pair[1]:
            sizes.append(pair[0])
            continue
        fitting = [p for p in PRODUCTS if pair == tuple(math.prod(shape[name] for name in p) for shape in SHAPES)]
        if not fitting:
            raise UnsupportedModelError(
                f"{type(partition.model).__name__} can't be trained in several processes: {name}, which crosses from stage "
                f"to stage, has the shapes {small} and {large} for batches of {SHAPES[0]} and {SHAPES[1]}, which is no "
                "product of rows and tokens; run it in one process"
            )
        sizes.append(fitting[0])
    return tuple(sizes)
