"""Experts of a layer: found by structure, and counted as far as a token passes them."""

from __future__ import annotations

import pytest
import torch
from decoders import tiny
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_ouroboros.partition.experts import active_cost, find_experts, routing_parameters
from hf_ouroboros.partition.families import find_family

WIDTH, EXPERTS, CHOSEN = 32, 4, 2


def on_meta(model_type: str, **options: object) -> PreTrainedModel:
    """A tiny model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny(model_type, **options))


def routing_of(layer: nn.Module) -> set[str]:
    """Names of the parameters that route."""
    ids = routing_parameters(layer)
    return {name for name, parameter in layer.named_parameters() if id(parameter) in ids}


@pytest.mark.parametrize(
    ("model_type", "inner", "routing"),
    [
        ("mixtral", 48, {"mlp.gate.weight"}),
        ("qwen3_moe", 16, {"mlp.gate.weight"}),
        ("gpt_oss", 48, {"mlp.router.weight", "mlp.router.bias"}),
        ("deepseek_v3", 16, {"mlp.gate.weight"}),
    ],
)
def test_stacked_experts(model_type: str, inner: int, routing: set[str]) -> None:
    model = on_meta(model_type)
    layer = model.model.layers[2]
    (experts,) = find_experts(layer, model.config)
    assert (experts.name, experts.count, experts.active) == ("mlp.experts", EXPERTS, CHOSEN)
    one = 3 * WIDTH * inner
    assert experts.elements == EXPERTS * one
    others = sum(p.numel() for n, p in layer.named_parameters() if p.dim() > 1 and ".experts." not in n)
    assert active_cost(layer, model.config) == others + CHOSEN * one
    assert routing_of(layer) == routing
    family = find_family(model)
    assert family.cost(model, "model.layers.2") == others + CHOSEN * one
    costs = [unit.cost for unit in family.units(model) if unit.kind == "layer"]
    assert costs[2] == others + CHOSEN * one


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3_text"])
def test_dense_layers_have_none(model_type: str) -> None:
    model = on_meta(model_type)
    family = find_family(model)
    for name in family.layers(model):
        layer = model.get_submodule(name)
        assert find_experts(layer, model.config) == []
        assert routing_of(layer) == set()
        assert family.cost(model, name) is None


def test_a_dense_layer_of_a_mixture_costs_its_matrices() -> None:
    model = on_meta("qwen3_moe")
    assert [len(find_experts(layer, model.config)) for layer in model.model.layers] == [1, 0, 1]
    assert routing_of(model.model.layers[1]) == set()


class Listed(nn.Module):
    """A layer with experts that are modules, as models of other people's code have them."""

    def __init__(self, inner: str = "mlp") -> None:
        super().__init__()
        block = nn.Module()
        block.top_k = 3
        block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        block.shared_experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        block.choice = nn.Linear(8, 5)  # known by its five rows
        block.gate_proj = nn.Linear(8, 16)
        self.add_module(inner, block)
        self.gate = nn.Linear(8, 8)  # beside the block, as a gate of experts could be
        self.attention = nn.ModuleDict({"gate": nn.Linear(8, 8)})


def test_listed_experts() -> None:
    layer, config = Listed(), tiny("llama")
    (experts,) = find_experts(layer, config)
    assert (experts.count, experts.active, experts.elements) == (5, 3, 5 * 64)
    assert experts.idle == 2 * 72
    assert active_cost(layer, config) == 3 * 64 + 2 * 64 + 40 + 128 + 64 + 64
    assert routing_of(layer) == {"mlp.choice.weight", "mlp.choice.bias", "gate.weight", "gate.bias"}


def test_experts_that_all_compute_everything_are_all_active() -> None:
    class AllExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts, self.top_k = 4, 1
            self.up = nn.Parameter(torch.empty(4, 8, 8))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.bmm(hidden, self.up)

    layer = nn.Module()
    layer.experts = AllExperts()
    (experts,) = find_experts(layer, tiny("llama"))
    assert experts.active == experts.count == 4
    assert experts.idle == 0
