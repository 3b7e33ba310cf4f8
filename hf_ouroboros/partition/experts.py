"""Mixtures of experts inside a layer: whose parameters are experts', how many experts a token passes, and what routes.

All of it is read off the modules. Experts are stacked in tensors [E, ...] of a module that knows its E, or are modules of
their own in a list whose name says so:

    mlp.gate          [E, width]                router
    mlp.experts       [E, ...] or a list of E   of which a token passes k
    mlp.shared_expert                           a part of every token's way, and no expert here
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from .packed import sizes

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class Experts:
    """The experts of one module of a layer.

    Args:
        name: of the module in the layer.
        parameters: all of its experts', stacked or not.
        count: how many experts there are, E.
        active: how many of them a token passes, k.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    count: int
    active: int

    @property
    def elements(self) -> int:
        """Of the experts' matrices; biases, one number per expert and output, don't count."""
        most = max(p.dim() for p in self.parameters)
        return sum(p.numel() for p in self.parameters if p.dim() == most)

    @property
    def idle(self) -> int:
        """How many of the experts' parameters a token does not pass."""
        total = sum(p.numel() for p in self.parameters)
        return total - total * self.active // self.count


def find_experts(layer: nn.Module, config: PretrainedConfig) -> list[Experts]:
    """The experts of a layer, by module; none in a dense one.

    Args:
        layer: of a model, which may be on the meta device.
        config: of the model, for layers that don't know themselves how many experts a token passes.
    """
    found = []
    for name, module in layer.named_modules():
        parameters, count = _listed(name, module) or _stacked(module) or ((), 0)
        if parameters:
            found.append(Experts(name, parameters, count, _active(layer, name, module, count, config)))
    return found


def active_cost(layer: nn.Module, config: PretrainedConfig) -> float | None:
    """Multiply-adds per token of a layer with experts; None of a dense one."""
    experts = find_experts(layer, config)
    if not experts:
        return None
    routed = {id(p) for some in experts for p in some.parameters}
    real = sizes(layer.parameters(), layer)
    always = sum(real[id(p)].elements for p in layer.parameters() if p.dim() > 1 and id(p) not in routed)
    return always + sum(some.elements * some.active / some.count for some in experts)


def routing_parameters(layer: nn.Module) -> set[int]:
    """Ids of the parameters that choose between experts, or between streams.

    They are those of what is called a router, by its name or its class; in layers with experts also those of a `gate` beside
    the experts (not of `gate_proj`, which is a half of a gated layer), and of a linear one beside them with E outputs.
    """
    beside: dict[str, int] = {}
    for name, module in layer.named_modules():
        _, count = _listed(name, module) or _stacked(module) or ((), 0)
        if count:
            parts = name.split(".")
            beside |= {".".join(parts[:depth]): count for depth in range(len(parts))}
    found: set[int] = set()
    for name, module in layer.named_modules():
        parent, _, own = name.rpartition(".")
        router = "router" in own.lower() or "Router" in type(module).__name__
        gate = parent in beside and own == "gate"
        linear = parent in beside and parent and isinstance(module, nn.Linear) and len(module.weight) == beside[parent]
        if router or gate or linear:
            found.update(id(p) for p in module.parameters())
    return found


def _listed(name: str, module: nn.Module) -> tuple[tuple[nn.Parameter, ...], int] | None:
    own = name.rpartition(".")[2].lower()
    if (
        isinstance(module, (nn.ModuleList, nn.ModuleDict))
        and len(module) > 1
        and "expert" in own
        and "shared" not in own
    ):
        return tuple(module.parameters()), len(module)
    return None


def _stacked(module: nn.Module) -> tuple[tuple[nn.Parameter, ...], int] | None:
    own = [p for p in module._parameters.values() if p is not None]
    named = "expert" in type(module).__name__.lower()
    count = _number(module, COUNTS) or (max((len(p) for p in own if p.dim() > 2), default=0) if named else 0)
    if count < 2:
        return None
    if any(p.dim() > 2 and len(p) == count for p in own):
        return tuple(p for p in own if p.dim() > 1 and len(p) == count), count
    # On top of each other in two dimensions.
    flat = tuple(p for p in own if named and p.dim() == 2 and len(p) > count and len(p) % count == 0)
    return (flat, count) if flat else None


def _active(layer: nn.Module, name: str, module: nn.Module, count: int, config: PretrainedConfig) -> int:
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        given = list(inspect.signature(type(module).forward).parameters.values())[1:]
        if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given) == 1:
            return count  # not told whose tokens it gets: all experts compute all tokens, and most is thrown away
    known = next(_chosen(layer, name), None) or _number(config.get_text_config(), CHOSEN)
    return min(known or count, count)


def _chosen(layer: nn.Module, name: str) -> Iterator[int]:
    """What modules around the experts say, those near to them first."""
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        for module in layer.get_submodule(".".join(parts[:depth])).modules():
            if (number := _number(module, CHOSEN)) is not None:
                yield number


def _number(thing: object, names: tuple[str, ...]) -> int | None:
    values = (vars(thing).get(name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
