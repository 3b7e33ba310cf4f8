"""Mean of a stage's gradients over data-parallel replicas, bucket by bucket, while its backward is still running.

    backward of the last micro-batch   layer 3 | layer 2 | layer 1 | layer 0
    mean over the replicas                     | layer 3 | layer 2 | layer 1 | layer 0   <- only this one is waited for

Which gradients share a bucket, and in which order buckets start, is fixed by the stage's parameters: all replicas do
the same whatever their timing, and a gradient that was computed early (by a checkpoint) is summed in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch


class ReplicaMean(Protocol):
    """Averages tensors over replicas.

    Attributes:
        bucket_bytes: how much it likes to get at once.
    """

    bucket_bytes: int

    def start(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Begins to average tensors of one dtype, in place; the function returned waits until that is done."""

    def close(self, drained: bool) -> None:
        """The end; see `Transport.close`."""


class BucketedMean:
    """Averages the gradients of one stage, once per update.

    Args:
        mean: averages one bucket.
        parameters: the stage's own parameters by name, in the model's order.
    """

    def __init__(self, mean: ReplicaMean, parameters: Mapping[str, torch.Tensor]):
        self._mean = mean
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        # A backward meets the layers from the last to the first.
        self._buckets = _buckets(dict(reversed(trained.items())), mean.bucket_bytes)
        self._ready: set[str] = set()
        self._started: list[Callable[[], None]] = []
        self._next = 0

    def ready(self, name: str, window: Mapping[str, torch.Tensor]) -> None:
        """Tells that a gradient is complete; starts the buckets whose turn has come.

        Args:
            name: of the parameter.
            window: {name: gradient} of the open update; complete gradients are not replaced any more.
        """
        self._ready.add(name)
        while self._next < len(self._buckets) and self._ready.issuperset(self._buckets[self._next]):
            self._start(window)

    def rest(self, window: Mapping[str, torch.Tensor]) -> None:
        """Tells that all gradients are complete; starts the buckets that have not been started."""
        while self._next < len(self._buckets):
            self._start(window)

    def wait(self) -> None:
        """Waits until all gradients are averaged, and is ready for the next update."""
        for finish in self._started:
            finish()
        self._started, self._next = [], 0
        self._ready.clear()

    def _start(self, window: Mapping[str, torch.Tensor]) -> None:
        tensors = [window[name] for name in self._buckets[self._next] if name in window]
        self._next += 1
        if tensors:
            self._started.append(self._mean.start(tensors))


def _buckets(parameters: Mapping[str, torch.Tensor], bucket_bytes: int) -> list[list[str]]:
    """Runs of names of one dtype, of at most `bucket_bytes` each, or of a single larger parameter."""
    buckets: list[list[str]] = []
    size, dtype = 0, None
    for name, parameter in parameters.items():
        if parameter.dtype != dtype or size + parameter.nbytes > bucket_bytes:
            buckets.append([])
            size, dtype = 0, parameter.dtype
        buckets[-1].append(name)
        size += parameter.nbytes
    return buckets
