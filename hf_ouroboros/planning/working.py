"""What a forward and a backward need for a moment, besides what is kept: the life of every tensor is followed, on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..partition.meta import Answers


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each storage once.

    Args:
        known: tensors that don't count.

    Attributes:
        bytes: now.
        peak: most of them since it was last set.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self._alive: dict[int, Any] = {}  # weak references, or storages that don't count
        for tensor in known:
            self.know(tensor)

    def know(self, tensor: torch.Tensor) -> None:
        """Doesn't count what a tensor holds."""
        storage = tensor.untyped_storage()
        if isinstance(self._alive.get(storage._cdata), weakref.ref):
            self.bytes -= storage.nbytes()
        self._alive[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.note(each)
        self.peak = max(self.peak, self.bytes)
        return result

    def note(self, tensor: torch.Tensor) -> None:
        """Counts what a tensor holds, until it is let go."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda reference: self._end(key, size, reference))
            self.bytes += size

    def _end(self, key: int, size: int, reference: Any) -> None:
        if self._alive.get(key) is reference:
            del self._alive[key]
            self.bytes -= size


def needed_bytes(
    model: nn.Module, layers: Sequence[nn.Module], forward: Callable[[Living], torch.Tensor]
) -> list[float]:
    """Most bytes that are alive at a time while a part is computed, beyond those before its forward began.

    A backward adds to gradients that are there already, as all but the first of an update do. A model whose backward does not
    run without data is counted by its forward.

    Args:
        model: on the meta device.
        layers: of it, in execution order.
        forward: gives the loss of a micro-batch; told who counts.

    Returns:
        Of what comes before the layers, every layer, and what comes after them.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.empty_like(p) for p in trained]
    living = Living([*model.parameters(), *model.buffers(), *gradients])
    follower = _Follower(living, len(layers) + 2)
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    try:
        with follower.watching(layers), living:
            loss = forward(living)
            try:
                with Answers():
                    loss.backward()
            except RuntimeError:
                pass
        follower.go_on_to(0)
        return follower.found()
    finally:
        for parameter in trained:
            parameter.grad = None


class _Follower:
    """Books what is alive on the part that is running, in the forward and in the backward."""

    def __init__(self, living: Living, parts: int):
        self._living = living
        self._running, self._after = 0, parts - 1
        self._starts, self._peaks = [0.0] * parts, [0.0] * parts

    def go_on_to(self, part: int) -> None:
        """Another part runs."""
        self._peaks[self._running] = max(self._peaks[self._running], self._living.peak)
        self._living.peak, self._running = self._living.bytes, part

    def found(self) -> list[float]:
        """Bytes of every part."""
        return [peak - start for peak, start in zip(self._peaks, self._starts, strict=True)]

    @contextmanager
    def watching(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Within this context, notices which layer runs."""
        handles = []
        for i, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(partial(self._enter, i + 1), with_kwargs=True))
            handles.append(layer.register_forward_hook(partial(self._leave, i + 1)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, part: int) -> None:
        self.go_on_to(part)
        self._starts[part] = self._living.bytes

    def _enter(self, part: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._begin(part)
        if part == 1:
            self._when_arrived((args, kwargs), 0)

    def _leave(self, part: int, module: nn.Module, args: Any, output: Any) -> None:
        self._when_arrived(output, part)
        self._begin(self._after)

    def _when_arrived(self, values: Any, part: int) -> None:
        """In the backward, a part runs from where the gradient of what it has put out is there."""
        for each in tree_leaves(values):
            if isinstance(each, torch.Tensor) and each.requires_grad:
                each.register_hook(lambda gradient: self.go_on_to(part))
                return
