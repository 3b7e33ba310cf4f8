"""Counts FLOPs and kept bytes of every layer in one forward on the meta device: tensors without data.

FLOPs are those of matrix products and attentions. Kept bytes are those that autograd saves for the backward, each
storage once, weights excepted. Of layers that are alike, one stands for all. Experts compute the tokens that chose them.
Then forward and backward run once more, to find out what they need besides (`working.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..partition.late_logits import LARGE_VOCABULARY, LateLogits, only_counted, only_one_chunk
from ..partition.meta import Answers, batched_experts, call_options
from ..partition.multiplied import MULTIPLYING
from .autocasting import DTYPE, Autocasting
from .kinds import layer_kinds
from .working import Living, needed_bytes


@dataclass
class Part:
    """A layer, or what comes before or after the layers.

    Args:
        flops: of its forward.
        kept_bytes: from its forward to its backward.
        later_bytes: what a divided backward keeps of its matrices' products: the gradients that arrive, and the inputs.
        working_bytes: what its forward or its backward needs for a moment, besides what is kept.
        output_size: elements of the hidden state that a layer returns.
    """

    flops: float = 0.0
    kept_bytes: float = 0.0
    later_bytes: float = 0.0
    working_bytes: float = 0.0
    output_size: int = 0


def trace(
    model: PreTrainedModel, layer_names: Sequence[str], batch: int, time: int, autocast: bool = False
) -> list[Part]:
    """What comes before the layers, every layer, what comes after them with the loss.

    Args:
        model: a causal language model on the meta device; unusable afterwards.
        layer_names: full names of its layers, in one list of modules.
        batch: rows of the micro-batch.
        time: tokens per row.
        autocast: whether products are computed in bfloat16.
    """
    layers = [model.get_submodule(name) for name in layer_names]
    kinds = layer_kinds(layers)
    if not any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        kinds = _without_the_first(kinds)
    first = layers[: max(kinds) + 1]
    if len(first) == len(layers):
        return _Tracer(model, layers, autocast).run(batch, time)
    stack = layer_names[0].rpartition(".")[0]
    whole = model.get_submodule(stack)
    try:
        model.set_submodule(stack, nn.ModuleList(first))
        before, *parts, after = _Tracer(model, first, autocast).run(batch, time)
    except Exception:  # a forward that asks for the other layers: they run too
        model.set_submodule(stack, whole)
        return _Tracer(model, layers, autocast).run(batch, time)
    return [before, *(parts[kind] for kind in kinds), after]


def _without_the_first(kinds: Sequence[int]) -> list[int]:
    """The first layer stands for itself: no gradient of its input is computed, for which others keep more than it does."""
    alike = next((i for i, kind in enumerate(kinds) if i and kind == 0), 0)
    return [0, *(kind or alike for kind in kinds[1:])]


class _LateHead(nn.Linear):
    """A head that gives late logits past the hooks of modules: the counter's look at what modules return."""

    autocasting: Autocasting | None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        given: Any = (hidden, self.weight, self.bias)
        if self.autocasting is not None:
            given = (None if each is None else self.autocasting.lowered(each) for each in given)
        return LateLogits.of(*given)


class _Tracer:
    """Runs a model and books what happens on the part that is running."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], autocast: bool = False):
        self.model = model
        self._autocasting = Autocasting(model) if autocast else None
        self.layers = layers
        self.parts = [Part() for _ in range(len(layers) + 2)]
        self._running = 0
        self._counter = FlopCounterMode(display=False)
        self._counted = 0.0
        self._inputs: dict[int, Any] = {}  # storages of what matrices were multiplied with
        self._known = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}

    def run(self, batch: int, time: int) -> list[Part]:
        """One forward with the loss."""
        handles = [layer.register_forward_pre_hook(self._enter(i + 1)) for i, layer in enumerate(self.layers)]
        handles += [layer.register_forward_hook(self._leave) for layer in self.layers]
        self._let_head_be_late()
        handles += [module.register_forward_hook(self._join) for module in filter(_is_for_later, self.model.modules())]
        ids = torch.zeros(batch, time, dtype=torch.long, device="meta")
        self.model.train()
        self.model.loss_type = "ForCausalLM"  # some configurations name none and would be warned of
        saving = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        try:
            with only_counted(), self._counter, self._scopes(self._know, self._book), saving:
                self._loss(ids)
        finally:
            for handle in handles:
                handle.remove()
        self._go_on_to(self._running)
        for part, needed in zip(self.parts, needed_bytes(self.model, self.layers, self._loss_again(ids)), strict=True):
            part.working_bytes = max(0.0, needed - part.kept_bytes)
        return self.parts

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        # Past the hooks of the whole, with which the counter would look at logits that are late.
        return self.model.forward(input_ids=ids, labels=ids, **call_options(self.model)).loss

    def _loss_again(self, ids: torch.Tensor) -> Callable[[Living], torch.Tensor]:
        def forward(living: Living) -> torch.Tensor:
            with only_one_chunk(), self._scopes(living.know, lambda flops: None):
                return self._loss(ids)

        return forward

    @contextmanager
    def _scopes(self, know: Callable[[torch.Tensor], None], book: Callable[[float], None]) -> Iterator[None]:
        """Within this context, the model runs on the meta device as it would run elsewhere.

        Args:
            know: told what is no activation.
            book: told the FLOPs of attentions.
        """
        with ExitStack() as scopes:
            scopes.enter_context(batched_experts(self.model.config))
            for mode in (Answers(), _FusedAttention(book), _GatheredWeights(know)):
                scopes.enter_context(mode)
            if self._autocasting is not None:
                scopes.enter_context(self._autocasting.telling(know))
            yield

    def _let_head_be_late(self) -> None:
        """Has no logits built where training, left to itself, builds none."""
        head = self.model.get_output_embeddings()
        if type(head) in (nn.Linear, _LateHead) and self.model.config.get_text_config().vocab_size >= LARGE_VOCABULARY:
            head.__class__ = _LateHead
            head.__dict__["autocasting"] = self._autocasting

    def _enter(self, part: int) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: self._go_on_to(part)

    def _join(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        part, given = self.parts[self._running], inputs[0]
        part.later_bytes += output.nbytes
        if self._autocasting is not None:
            part.later_bytes += given.numel() * DTYPE.itemsize  # converted for every product anew
        elif (storage := given.untyped_storage())._cdata not in self._inputs:
            self._inputs[storage._cdata] = storage
            part.later_bytes += given.nbytes

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        values = output if isinstance(output, (tuple, list)) else (output,)
        self.parts[self._running].output_size = next(v.numel() for v in values if isinstance(v, torch.Tensor))
        self._go_on_to(len(self.parts) - 1)

    def _go_on_to(self, part: int) -> None:
        total = float(self._counter.get_total_flops())
        self.parts[self._running].flops += total - self._counted
        self._counted, self._running = total, part

    def _book(self, flops: float) -> None:
        self.parts[self._running].flops += flops

    def _know(self, tensor: torch.Tensor) -> None:
        """Doesn't count what a tensor holds."""
        self._known[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage  # kept alive, so that the key stays its own
            self.parts[self._running].kept_bytes += storage.nbytes()
        return tensor


def _is_for_later(module: nn.Module) -> bool:
    """Whether a module multiplies by a trained matrix, whose gradient a divided backward leaves for later."""
    return isinstance(module, MULTIPLYING) and type(module) is not _LateHead and module.weight.requires_grad


class _FusedAttention(TorchFunctionMode):
    """Scaled dot product attention as fused kernels have it: no score matrix is kept.

    Args:
        book: told the FLOPs.
    """

    def __init__(self, book: Callable[[float], None]):
        super().__init__()
        self._book = book

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        batch, heads, time, width = query.shape
        self._book(2.0 * batch * heads * time * key.shape[-2] * (width + value.shape[-1]))
        return _KeepsInputsAndOutput.apply(query, key, value)


class _GatheredWeights(TorchFunctionMode):
    """What is taken out of a weight is no activation: kernels that group tokens by experts read it where it is.

    Args:
        know: told the tensors.
    """

    def __init__(self, know: Callable[[torch.Tensor], None]):
        super().__init__()
        self._know = know

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__ and isinstance(args[0], nn.Parameter):
            self._know(result)
        return result


class _KeepsInputsAndOutput(torch.autograd.Function):
    """What a fused attention keeps: its inputs, its output, and one number per row and head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))
