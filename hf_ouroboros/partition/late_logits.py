"""A head that does not build its logits: they stay hidden states and a matrix until somebody looks at them.

Logits are the largest tensor of a training step (rows x vocabulary, in float32), and all that a language model's loss wants of them is a
number. So where only the loss is wanted the head gives `LateLogits`: a tensor that knows its shape and what it would be computed
from. Reshaping it, cutting off tokens and converting it to float32 keep it late; cross entropy is computed from it chunk by
chunk; anything else (soft caps, a loss of one's own) makes the logits and goes on with them, to the same numbers as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

CHUNK_NUMBERS = 2**23
"""Logits that exist at a time: 32 MiB in float32."""

LARGE_VOCABULARY = 2**14
"""From this size on, logits are late unless told otherwise."""

_of_this_thread = threading.local()

# Descriptors, which torch's annotations take for what they give. Each look at `__get__` makes an equal one, not the same.
_DTYPE: Any = torch.Tensor.dtype
_REQUIRES_GRAD: Any = torch.Tensor.requires_grad
_METADATA = frozenset(
    getattr(torch.Tensor, name).__get__ for name in ("shape", "device", "dtype", "ndim", "layout", "is_cuda", "is_meta")
) | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.__len__}
_RESHAPING = frozenset({torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.flatten, torch.flatten, torch.reshape})


@contextmanager
def _set_here(name: str, value: bool) -> Iterator[None]:
    """Within this context, in this thread."""
    before = getattr(_of_this_thread, name, False)
    setattr(_of_this_thread, name, value)
    try:
        yield
    finally:
        setattr(_of_this_thread, name, before)


def only_loss_wanted(wanted: bool = True) -> AbstractContextManager[None]:
    """Within this context, in this thread, nobody looks at the logits of a head that is able to give late ones."""
    return _set_here("late", wanted)


@contextmanager
def late_logits_wanted(wanted: bool = True) -> Iterator[None]:
    """Within this context, in this thread, somebody makes do with late logits, which the model's output then has."""
    with _set_here("kept", wanted), only_loss_wanted(wanted):
        yield


def only_counted() -> AbstractContextManager[None]:
    """Within this context, in this thread, the loss of late logits leaves its gradients out: as much work as a plain forward."""
    return _set_here("counted", True)


def only_one_chunk() -> AbstractContextManager[None]:
    """Within this context, in this thread, the loss of late logits needs what it always needs, and takes the time of a chunk."""
    return _set_here("one_chunk", True)


def with_late_logits(head: nn.Module) -> None:
    """Lets a head give late logits where only the loss is wanted; one that is no plain matrix stays as it is."""
    if type(head) is not nn.Linear:
        return
    call = head._compiled_call_impl or head._call_impl

    def late(*args: Any, **kwargs: Any) -> torch.Tensor:
        hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
        if not getattr(_of_this_thread, "late", False) or hooks or len(args) != 1 or kwargs:
            return call(*args, **kwargs)
        return LateLogits.of(args[0], head.weight, head.bias)

    head._compiled_call_impl = late


def without_late(output: Any) -> Any:
    """What a model returns, without logits that were never made, unless somebody wants late ones."""
    if getattr(_of_this_thread, "kept", False) or not isinstance(getattr(output, "logits", None), LateLogits):
        return output
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})


class LateLogits(torch.Tensor):
    """Logits as `F.linear(hidden, weight, bias)`, not computed yet.

    Attributes:
        hidden: [..., width].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    @staticmethod
    def of(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None = None
    ) -> LateLogits:
        """Logits of hidden states, to be computed later.

        Args:
            hidden: [..., width].
            weight: [vocabulary, width].
            bias: [vocabulary], or None.
            dtype: what they are converted to; None for none.
        """
        computed = _autocast_dtype(hidden.device) or hidden.dtype
        shape = (*hidden.shape[:-1], weight.shape[0])
        empty = torch.empty(1, dtype=dtype or computed, device=hidden.device).expand(shape)  # the size of one number
        late = empty.as_subclass(LateLogits)
        late.hidden, late.weight, late.bias = hidden, weight, bias
        return late

    def made(self) -> torch.Tensor:
        """The logits."""
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(self.hidden, self.weight, self.bias).to(_DTYPE.__get__(self))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Stays late, computes a loss, or makes the logits."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **kwargs)
            if func == _REQUIRES_GRAD.__get__:
                sources = (args[0].hidden, args[0].weight, args[0].bias)
                return torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in sources)
            if args and isinstance(args[0], cls):
                found = _still_late(func, args[0], args[1:], kwargs)
                if found is not None:
                    return found
        return func(*map(_made, args), **{key: _made(value) for key, value in kwargs.items()})


def _made(value: Any) -> Any:
    """A value of an argument, with the logits in the place of late ones."""
    if isinstance(value, LateLogits):
        return value.made()
    return type(value)(map(_made, value)) if type(value) in (list, tuple) else value


def _still_late(func: Any, late: LateLogits, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a function gives without the logits; None if it needs them."""
    hidden, dtype = late.hidden, late.dtype

    def again(hidden: torch.Tensor, dtype: torch.dtype = dtype) -> LateLogits:
        return LateLogits.of(hidden, late.weight, late.bias, dtype)

    if func is torch.Tensor.float:
        return again(hidden, torch.float32)
    if func is torch.Tensor.contiguous and not args and not kwargs:
        return again(hidden)
    if func in _RESHAPING:
        shape = torch.empty(1, device="meta").expand(late.shape)  # whoever counts tensors finds a number
        shape = func(shape, *args, **kwargs).shape
        if len(shape) > 1 and shape[-1] == late.shape[-1]:
            return again(hidden.reshape(*shape[:-1], hidden.shape[-1]))
    if func is torch.Tensor.__getitem__ and len(args) == 1:
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        plain = all(i is Ellipsis or isinstance(i, slice) for i in index)
        touched = index[-1] is not Ellipsis if Ellipsis in index else len(index) >= late.dim()
        if plain and (not touched or index[-1] == slice(None)):
            return again(hidden[index])
    if func is F.cross_entropy:
        return _loss(late, *args, **kwargs)
    return None


def _loss(
    late: LateLogits,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """As `F.cross_entropy`; None for what is not computed in chunks."""
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0
    if not plain or reduction not in ("sum", "mean") or late.dim() != 2 or target.dim() != 1:
        return None
    if late.dtype != torch.float32:
        return None  # a sum of rounded losses would be worth nothing
    hidden, matrix, bias = late.hidden, late.weight, late.bias
    graded = torch.is_grad_enabled() and not getattr(_of_this_thread, "counted", False)
    if (dtype := _autocast_dtype(hidden.device)) is None:
        total = ChunkedCrossEntropy.apply(hidden, matrix, bias, target, ignore_index, graded)
    else:
        hidden, matrix, bias = hidden.to(dtype), matrix.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            total = ChunkedCrossEntropy.apply(hidden, matrix, bias, target, ignore_index, graded)
    return total if reduction == "sum" else total / (target != ignore_index).sum()


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What matrices are computed in under autocast; None without."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of rows, from hidden states; logits exist for one chunk of rows at a time.

    Where a gradient is wanted, the forward computes it from the same logits, so that the head costs as many products as with
    logits that are kept. The gradient of the sum is linear in what comes back, which the backward multiplies by. Sums over rows
    and chunks are float32 whatever the weights are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        ignore_index: int,
        with_gradients: bool,
    ) -> torch.Tensor:
        """The sum.

        Args:
            ctx: autograd's.
            hidden: [rows, width].
            weight: [vocabulary, width].
            bias: [vocabulary], or None.
            target: [rows], token ids or `ignore_index`.
            ignore_index: target of rows that don't count.
            with_gradients: whether a backward may follow; autograd does not tell its functions.
        """
        wanted = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_weight = torch.zeros(weight.shape, device=weight.device) if wanted[1] else None
        of_bias = torch.zeros(bias.shape, device=bias.device) if bias is not None and wanted[2] else None
        counted = target != ignore_index
        safe = target.masked_fill(~counted, 0)
        total = torch.zeros((), device=hidden.device)
        for rows in _chunks(hidden, weight):
            logits = F.linear(hidden[rows], weight, bias).float()
            chosen, counts = safe[rows, None], counted[rows, None]
            normalizers = torch.logsumexp(logits, -1, keepdim=True)
            total += ((normalizers - logits.gather(-1, chosen)) * counts).sum()
            if not any(wanted):
                continue
            share = logits.sub_(normalizers).exp_()
            share.scatter_add_(-1, chosen, -torch.ones_like(normalizers))
            share.mul_(counts)
            if of_bias is not None:
                of_bias += share.sum(0)
            share = share.to(weight.dtype)
            if of_hidden is not None:
                of_hidden[rows] = share @ weight
            if of_weight is None:
                continue
            if weight.dtype == of_weight.dtype:
                torch.addmm(of_weight, share.T, hidden[rows], out=of_weight)
            else:
                of_weight += share.T @ hidden[rows]
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden states, matrix and bias. A divided backward asks twice, so they stay as they are."""
        scaled = (
            None if each is None else torch.mul(each, gradient, out=torch.empty_like(each, dtype=ctx.dtype))
            for each in ctx.saved_tensors
        )
        return (*scaled, None, None, None)


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_NUMBERS // weight.shape[0])
    stop = 1 if getattr(_of_this_thread, "one_chunk", False) else len(hidden)
    for start in range(0, stop, size):
        yield slice(start, start + size)
