"""Places: forwards with other tensors, as torch.func.functional_call makes them, and nothing of it stays."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_gpt2
from torch import nn
from torch.func import functional_call

from hf_ouroboros.engine.places import Places
from hf_ouroboros.partition.ownership import parameter_places


def test_as_functional_call() -> None:
    model = tiny_gpt2(tied=True).eval()
    inputs = {"input_ids": torch.arange(8)[None]}
    places = dict(parameter_places(model))
    assert {"transformer.wte.weight", "lm_head.weight"} <= places.keys()
    other = {name: (p.detach() * 1.5).requires_grad_() for name, p in places.items()}  # a tied matrix by two tensors
    expected = functional_call(model, other, (), inputs, tie_weights=False).logits
    with Places(model, places).holding(other):
        found = model(**inputs).logits
        assert all(tensor is other[name] for name, tensor in parameter_places(model))
    assert torch.equal(found, expected)
    assert all(tensor is places[name] for name, tensor in parameter_places(model))
    found.sum().backward()
    assert all(tensor.grad is not None for tensor in other.values()) and all(p.grad is None for p in places.values())


@pytest.mark.parametrize("missing", [False, True])
def test_parameters_come_back_after_an_error(missing: bool) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = dict(module.named_parameters())
    given = {name: torch.zeros_like(p) for name, p in before.items()}
    if missing:
        del given["1.bias"]
    with pytest.raises((KeyError, RuntimeError)), Places(module, before).holding(given):
        module(torch.zeros(3, 3))
    assert all(p is before[name] for name, p in module.named_parameters()) and len(before) == 4


def test_of_the_module_itself() -> None:
    module = nn.Linear(2, 2)
    with Places(module, ["weight"]).holding({"weight": torch.zeros(2, 2)}):
        assert torch.equal(module(torch.ones(1, 2))[0], module.bias)


def test_a_forward_that_makes_a_parameter_an_attribute() -> None:
    """As PEFT's does, where an adapter adds to a parameter: it parametrizes the layer and takes that back."""

    class Taking(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            weight = self.weight
            del self.weight
            self.weight = weight * 1  # type: ignore[assignment]
            return super().forward(input)

    module = Taking(2, 2)
    before = dict(module.named_parameters())
    places = Places(module, before)
    for _ in range(2):
        with places.holding({name: torch.zeros_like(p) for name, p in before.items()}):
            module(torch.ones(1, 2))
        assert all(module.get_parameter(name) is p for name, p in before.items()) and "weight" not in module.__dict__
