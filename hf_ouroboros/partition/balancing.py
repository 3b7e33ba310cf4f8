"""The loss that balances experts, over stages: each adds up what its routers chose, the last one makes the loss of it.

With `output_router_logits=True` a mixture of experts adds to its loss (Fedus et al. 2021, equations 4 to 6)

    coefficient * E * sum over experts e of (tokens sent to e / rows) * (probability of e / rows)

where tokens, probabilities and rows are sums over all layers. A boundary therefore carries 2E numbers: both sums over the
layers before it. The model itself still calls its own `load_balancing_loss_func` on the last stage, with its own arguments;
there the function goes on from the sums that were received.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .dissection import architecture_of
from .meta import Answers, batched_experts, call_options
from .shadow import on_meta

FUNCTION = "load_balancing_loss_func"
CHOSEN, PROBABILITIES = "expert_choices", "expert_probabilities"
"""Names by which the two sums cross boundaries; a gradient flows back through the probabilities."""

_PROBE_SHAPE = (2, 8)
_INSTALLING = threading.Lock()


@dataclass(frozen=True)
class Router:
    """Where a router's logits come from: a module, and which of the values it returns, None for the only one."""

    module: str
    index: int | None


@dataclass(frozen=True)
class Balancing:
    """The balancing loss of a model.

    Args:
        routers: in the order in which they run.
        experts: E.
        top_k: how many experts a token is sent to.
        masked: whether padding is left out by the batch's attention mask.
    """

    routers: tuple[Router, ...]
    experts: int
    top_k: int
    masked: bool

    def added(
        self, sums: Mapping[str, torch.Tensor], logits: list[torch.Tensor], mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The sums with some routers' choices added, one after the other.

        Args:
            sums: so far; empty at the beginning.
            logits: [rows, E] of each router.
            mask: [batch, time] of the tokens that are no padding; None where all count.
        """
        if not sums and not logits:
            return {}
        device = logits[0].device if logits else sums[CHOSEN].device
        nothing = torch.zeros(self.experts, dtype=torch.float32, device=device)
        chosen, probabilities = sums.get(CHOSEN, nothing), sums.get(PROBABILITIES, nothing)
        real = None if mask is None or not self.masked else mask.reshape(-1).to(device, torch.float32)
        for of_router in logits:
            weights = torch.softmax(of_router, dim=-1)
            experts = torch.topk(weights, self.top_k, dim=-1).indices.reshape(-1)
            weights = weights.float()
            if real is None:
                # Counting without a synchronisation: floats on CPUs, integers, which are exact, elsewhere.
                counted = experts.to(torch.float32 if device.type in ("cpu", "mps") else torch.int32)
                chosen = chosen + torch.histc(counted, bins=self.experts, min=0, max=self.experts)
            else:
                chosen = chosen + torch.zeros_like(nothing).scatter_add_(0, experts, real.repeat_interleave(self.top_k))
                weights = weights * real.unsqueeze(-1)
            probabilities = probabilities + weights.sum(dim=0)
        return {CHOSEN: chosen, PROBABILITIES: probabilities}

    def loss(self, sums: Mapping[str, torch.Tensor], rows: torch.Tensor | float) -> torch.Tensor:
        """The loss of all routers' sums.

        Args:
            sums: over all routers.
            rows: tokens of a batch that count, for one router.
        """
        total: torch.Tensor | float = 0.0
        for _ in self.routers:
            total = total + rows
        return torch.sum(sums[CHOSEN] / total * (sums[PROBABILITIES] / total).unsqueeze(0)) * self.experts


class Continued:
    """A model's `load_balancing_loss_func`, which goes on from a stage's sums while `going_on` says so in this thread.

    Args:
        original: the model's function.
    """

    def __init__(self, original: Callable[..., Any]):
        functools.update_wrapper(self, original)
        self.original = original
        self.signature = inspect.signature(original)
        self._here = threading.local()

    @contextmanager
    def going_on(self, instead: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
        """Within this context, calls from this thread get what `instead` gives for the arguments, by name."""
        self._here.instead = instead
        try:
            yield
        finally:
            self._here.instead = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The loss."""
        instead = getattr(self._here, "instead", None)
        if instead is None:
            return self.original(*args, **kwargs)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return instead(dict(bound.arguments))


class RouterLogits:
    """The router logits of a stage's layers, kept while it runs, and what becomes of them.

    Args:
        model: the model that is split.
        core: the stage's shadow of it.
        own: names of the stage's layers.
        before: names of the layers of the stages before it.
    """

    def __init__(self, model: PreTrainedModel, core: nn.Module, own: tuple[str, ...], before: tuple[str, ...]):
        self._function = continued(model)
        self._balancing = find_balancing(model)
        self._logits: list[torch.Tensor] = []
        self._earlier = sum(_within(router.module, before) for router in self._balancing.routers)
        for router in self._balancing.routers:
            if _within(router.module, own):
                self._note(core.get_submodule(router.module), router.index)

    def _note(self, module: nn.Module, index: int | None) -> None:
        forward = module.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._logits.append(output if index is None else output[index])
            return output

        module.forward = noted

    def begin(self) -> None:
        """Forgets the logits of the forward before."""
        self._logits = []

    def sums(self, received: Mapping[str, torch.Tensor] | None, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What the next stage has to know, after this stage's layers have run."""
        return self._balancing.added(self._so_far(received), self._logits, mask)

    def _so_far(self, received: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        return {name: received[name] for name in (CHOSEN, PROBABILITIES)} if received and self._earlier else {}

    def finishing(self, received: Mapping[str, torch.Tensor] | None, tokens: int) -> AbstractContextManager[None]:
        """A context in which the model's own call of its balancing loss counts the layers of all stages."""

        def instead(given: dict[str, Any]) -> torch.Tensor:
            mask = given["attention_mask"]
            sums = self.sums(received, mask)
            masked = mask is not None and self._balancing.masked
            rows = mask.reshape(-1).to(sums[CHOSEN].device, torch.float32).sum() if masked else float(tokens)
            return self._balancing.loss(sums, rows)

        return self._function.going_on(instead)


# ---- finding it ----

_KNOWN: dict[str, Balancing | str] = {}


def continued(model: PreTrainedModel) -> Continued:
    """The function that a model calls for its balancing loss, which from now on can go on from a stage's sums.

    Raises:
        UnsupportedModelError: the model calls none of the known name.
    """
    names = inspect.unwrap(type(model).forward).__globals__
    if FUNCTION not in names:
        raise _refusal(model, f"its forward calls no {FUNCTION}")
    with _INSTALLING:
        if not isinstance(names[FUNCTION], Continued):
            names[FUNCTION] = Continued(names[FUNCTION])
    return names[FUNCTION]


def find_balancing(model: PreTrainedModel) -> Balancing:
    """How a model balances its experts, with or without weights: found by one forward on the meta device.

    Raises:
        UnsupportedModelError: it does so by another formula, or of other values, than can be added up over layers.
    """
    key = architecture_of(model)
    if key not in _KNOWN:
        try:
            _KNOWN[key] = _found(model)
        except UnsupportedModelError as error:
            _KNOWN[key] = str(error)
    found = _KNOWN[key]
    if isinstance(found, str):
        raise UnsupportedModelError(found)
    return found


def _found(model: PreTrainedModel) -> Balancing:
    function = continued(model)
    if not {"gate_logits", "num_experts", "top_k", "attention_mask"} == set(function.signature.parameters):
        raise _refusal(model, f"its {FUNCTION} takes {', '.join(function.signature.parameters)}")
    twin = on_meta(model).train()
    made: dict[int, Router] = {}
    calls: list[dict[str, Any]] = []

    def note(name: str) -> Callable[..., None]:
        def noted(module: nn.Module, inputs: Any, output: Any) -> None:
            values = enumerate(output) if isinstance(output, (tuple, list)) else [(None, output)]
            for index, value in values:
                if isinstance(value, torch.Tensor):
                    made.setdefault(id(value), Router(name, index))  # inner modules return first
                    kept.append(value)

        return noted

    def instead(given: dict[str, Any]) -> torch.Tensor:
        calls.append(given)
        return torch.zeros((), device="meta")

    kept: list[torch.Tensor] = []  # so that no id is given twice
    for name, module in twin.named_modules():
        module.register_forward_hook(note(name))
    ids = torch.zeros(_PROBE_SHAPE, dtype=torch.long, device="meta")
    mask = torch.ones_like(ids)
    with batched_experts(twin.config), Answers(), function.going_on(instead):
        try:
            twin(input_ids=ids, attention_mask=mask, **call_options(twin))
        except Exception as error:  # whatever needs data
            raise _refusal(model, f"its forward does not run without weights ({type(error).__name__})") from error
    if len(calls) != 1 or not isinstance(calls[0]["gate_logits"], tuple) or not calls[0]["gate_logits"]:
        raise _refusal(model, f"its forward calls {FUNCTION} {len(calls)} times, or without logits")
    (given,) = calls
    routers = tuple(made.get(id(logits), Router("", None)) for logits in given["gate_logits"])
    shapes = {tuple(logits.shape) for logits in given["gate_logits"]}
    known = given["attention_mask"] is None or given["attention_mask"] is mask
    if not all(r.module for r in routers) or shapes != {(ids.numel(), given["num_experts"])} or not known:
        raise _refusal(model, f"what it gives to {FUNCTION} is not what its routers return for the batch's tokens")
    found = Balancing(routers, given["num_experts"], given["top_k"], given["attention_mask"] is mask)
    if not _is_formula(found, function.original):
        raise _refusal(model, f"its {FUNCTION} does not add up over layers as Mixtral's does in transformers >= 5.24")
    return found


def _is_formula(found: Balancing, original: Callable[..., Any]) -> bool:
    """Whether a model's function gives the same value and gradients, to the last bit, as sums that cross a boundary."""
    generator = torch.Generator().manual_seed(0)
    tokens = 24
    mask = (torch.rand(tokens, generator=generator) > 0.3).long().reshape(2, tokens // 2)
    for given in (None, mask):
        logits = [torch.randn(tokens, found.experts, generator=generator).requires_grad_() for _ in range(3)]
        three = replace(found, routers=found.routers[:1] * 3, masked=True)
        rows = float(tokens) if given is None else given.reshape(-1).float().sum()
        ours = three.loss(three.added(three.added({}, logits[:1], given), logits[1:], given), rows)
        theirs = original(tuple(logits), found.experts, found.top_k, given)
        gradients = (torch.autograd.grad(value, logits) for value in (ours, theirs))
        if not torch.equal(ours, theirs) or not all(map(torch.equal, *gradients)):
            return False
    return True


def _refusal(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.output_router_logits=True adds a loss that balances the experts of all layers, which the stages of this "
        f"{type(model).__name__} can't put together: {why}; set it to False (the default) to train in stages"
    )


def _within(name: str, layers: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{layer}.") or name == layer for layer in layers)
