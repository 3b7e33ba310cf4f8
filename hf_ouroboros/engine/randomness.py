"""Dropout masks that depend on (seed, stage, tick) alone: the same under every schedule, and on replay."""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


def mask_seed(seed: int, stage: int, tick: int | str) -> int:
    """A 63-bit seed for one stage's forward of one micro-batch."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{tick}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def has_dropout(module: nn.Module) -> bool:
    """Whether any dropout layer in the module has a positive probability."""
    return any(getattr(m, "p", 0) > 0 for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd))


@contextlib.contextmanager
def seeded_dropout(seed: int, stage: int, tick: int | str, device: torch.device) -> Iterator[torch.Generator]:
    """Within this context, dropout on `device` draws from a generator of its own, and there is one for other draws on CPU.

    CPU dropout has one process-wide generator, on which the threads of several stages would race; here masks come
    from a generator made for this (stage, tick). Elsewhere the device's generator is seeded and put back.
    """
    value = mask_seed(seed, stage, tick)
    generator = torch.Generator().manual_seed(value)
    if device.type == "cpu":
        before, _of_this_thread.generator = getattr(_of_this_thread, "generator", None), generator
        try:
            with _OwnGenerator(generator):
                yield generator
        finally:
            _of_this_thread.generator = before
        return
    module = torch.get_device_module(device)
    with _device_lock(device):
        state = module.get_rng_state(device)
        try:
            with module.device(device):  # it is the current one's generator that is seeded
                module.manual_seed(value)
            yield generator
        finally:
            module.set_rng_state(state, device)


_of_this_thread = threading.local()
_locks: dict[str, threading.RLock] = {}


def _device_lock(device: torch.device) -> threading.RLock:
    return _locks.setdefault(str(device), threading.RLock())


@torch.library.custom_op("hf_ouroboros::drawn_here", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _drawn_here(like: torch.Tensor, probability: float) -> torch.Tensor:
    """Ones with a probability, else zeros, from the generator of this thread: an operation that compilers leave as it is."""
    return torch.empty_like(like, requires_grad=False).bernoulli_(probability, generator=_of_this_thread.generator)


@_drawn_here.register_fake
def _(like: torch.Tensor, probability: float) -> torch.Tensor:
    return torch.empty_like(like)


class _OwnGenerator(TorchFunctionMode):
    """Takes over `F.dropout` and the dropout inside fused attention; modes are local to a thread."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and _dropout_p(args, kwargs) > 0:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or p == 0:
            return input
        if torch.compiler.is_dynamo_compiling():  # in this thread
            keep = _drawn_here(input.detach(), 1 - p)
        else:
            keep = torch.empty_like(input, requires_grad=False).bernoulli_(1 - p, generator=self.generator)
        if p < 1:
            keep.div_(1 - p)
        return input.mul_(keep) if inplace else input * keep

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attention written out, as torch's own fallback does when there is dropout."""
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        lowest = torch.finfo(scores.dtype).min  # finite, so that a row without any key gives no NaN gradient
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, lowest)
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, lowest) if boolean else (scores + attn_mask).clamp(min=lowest)
        return self._dropout(torch.softmax(scores, -1), dropout_p) @ value


def _dropout_p(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    probability: float = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    return probability
