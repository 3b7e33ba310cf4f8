"""Gradients averaged over data-parallel replicas, while the device computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from .groups import Lease


class GroupMean:
    """Averages tensors over the processes that hold the same stages.

    Args:
        lease: a group of those processes.
        bucket_bytes: how much goes into one message.
    """

    def __init__(self, lease: Lease, bucket_bytes: int = 25 * 2**20):
        self.bucket_bytes = bucket_bytes
        self._lease, self._group = lease, lease.group
        self._size = dist.get_world_size(lease.group)

    def start(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Begins to average tensors of one dtype, in place; every process gives the same shapes in the same order.

        Returns:
            A function that waits until the tensors hold the means.
        """
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        work = dist.all_reduce(flat, group=self._group, async_op=True)

        def wait() -> None:
            work.wait()
            parts = flat.div_(self._size).split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

        return wait

    def close(self, drained: bool) -> None:
        """See `Transport.close`."""
        self._lease.end(drained)
