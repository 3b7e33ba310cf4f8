"""Gradients averaged over data-parallel replicas, in buckets, while the device computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

BUCKET_BYTES = 25 * 2**20


class GroupMean:
    """Averages tensors over the processes that hold the same stages.

    Args:
        group: those processes.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self._size = dist.get_world_size(group)

    def start(self, gradients: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Begins to average tensors, in place; every process gives the same shapes in the same order.

        Returns:
            A function that waits until the tensors hold the means.
        """
        buckets = []
        for tensors in _buckets(gradients):
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            buckets.append((tensors, flat, dist.all_reduce(flat, group=self._group, async_op=True)))

        def wait() -> None:
            for tensors, flat, work in buckets:
                work.wait()
                parts = flat.div_(self._size).split([tensor.numel() for tensor in tensors])
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

        return wait


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of tensors of one dtype, of about BUCKET_BYTES each."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
