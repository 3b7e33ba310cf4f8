"""Masks and positions whose values the host knows: what models ask of them is answered without waiting for an accelerator.

Models look at their masks to choose kernels ("is nothing padded?"), which on an accelerator means that the thread waits until
all that it has asked for is done. But a micro-batch comes from the host. So masks and positions are handed to the model as
tensors of the accelerator that carry the host's copy: what is computed of them alone is computed on both, and a question
in Python (`if mask.all()`) is answered by the copy.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import masking_utils

KEYS = ("attention_mask", "decoder_attention_mask", "position_ids")
"""What of a micro-batch models ask."""

_ASKING = (
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.Tensor.numpy,
)
_of_this_thread = threading.local()


class KnownTensor(torch.Tensor):
    """A tensor with a copy of its values in the host's memory, `host`; None once it was written to."""

    host: torch.Tensor | None = None

    @staticmethod
    def of(tensor: torch.Tensor, host: torch.Tensor) -> KnownTensor:
        """A tensor, on the same memory, with a copy of its values."""
        known = tensor.as_subclass(KnownTensor)
        known.host = host
        return known

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Computes with the tensors, and with the copies where all tensors have one."""
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        known = [value for value in tensors if isinstance(value, cls) and value.host is not None]
        if known and args and args[0] is known[0] and func in _ASKING:
            return func(known[0].host, *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if any(value is tensor for value in tree_flatten(result)[0] for tensor in known):
                if func is not torch.Tensor.to and func is not torch.Tensor.contiguous:
                    for value in known:  # it was written to
                        value.host = None
                return result
            if func is torch.Tensor.__setitem__:
                for value in known:
                    value.host = None
            if not isinstance(result, torch.Tensor):
                return result
            result = result.as_subclass(torch.Tensor)
            if len(known) < len(tensors) or ("device" in kwargs and func is not torch.Tensor.to):
                return result
            if func is torch.Tensor.to and (host := known[0].host) is not None:
                return cls.of(result, host.to(result.dtype))
            copies = tree_map_only(cls, lambda value: value.host, (args, kwargs))
            return cls.of(result, func(*copies[0], **copies[1]))


def known(selected: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage computes with, of which the host keeps masks and positions.

    Args:
        selected: the part of the micro-batch that the stage takes, on its device.
        batch: the micro-batch as it was submitted.
    """
    return {
        key: KnownTensor.of(value, batch[key])
        if key in KEYS and torch.is_tensor(value) and value.device.type != "cpu" == batch[key].device.type
        else value
        for key, value in selected.items()
    }


@contextlib.contextmanager
def plain_positions(batch: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """Within this context, in this thread, positions that the model counts itself aren't looked at.

    Models without given positions count them once for all rows, and then ask whether they were given several texts in a row.

    Args:
        batch: the micro-batch.
        device: where the model computes.
    """
    if device.type == "cpu" or batch.get("position_ids") is not None:
        yield
        return
    _ask_no_more()
    _of_this_thread.counts = True
    try:
        yield
    finally:
        _of_this_thread.counts = False


@functools.cache
def _ask_no_more() -> None:
    """Lets Transformers' question whether rows hold several texts know of `plain_positions`."""
    asked = getattr(masking_utils, "find_packed_sequence_indices", None)
    if asked is None:
        return

    @functools.wraps(asked)
    def answer(position_ids: torch.Tensor) -> torch.Tensor | None:
        rows = position_ids.shape[0]
        counted = getattr(_of_this_thread, "counts", False) and rows > 1 and position_ids.stride(0) == 0
        return None if counted else asked(position_ids)

    masking_utils.find_packed_sequence_indices = answer
