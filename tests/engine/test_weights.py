"""Weight versions: a pending backward sees the weights of its forward, whatever the optimizer did since."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from hf_ouroboros.engine.weights import WeightVersions


def make(frozen: bool = False) -> tuple[nn.Module, WeightVersions]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))
    if frozen:
        module[0].requires_grad_(False)
    return module, WeightVersions(dict(module.named_parameters()))


def gradients(leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for leaf in leaves.values():
        leaf.grad = None
    return found


def test_leaves_stay_until_the_next_step() -> None:
    module, versions = make()
    leaves = versions.leaves()
    assert versions.leaves() is leaves
    for name, parameter in module.named_parameters():
        assert leaves[name].is_leaf and leaves[name].requires_grad and leaves[name] is not parameter
        assert leaves[name].data_ptr() == parameter.data_ptr()  # no copy
    versions.advance(in_use=())
    assert versions.leaves() is not leaves


def test_unused_versions_are_stepped_in_place() -> None:
    module, versions = make()
    before = {name: p.data_ptr() for name, p in module.named_parameters()}
    versions.leaves()
    versions.advance(in_use=())
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == before


def test_a_version_in_use_keeps_its_storage() -> None:
    module, versions = make(frozen=True)
    parameters = dict(module.named_parameters())
    old = versions.leaves()
    values = {name: leaf.detach().clone() for name, leaf in old.items()}
    versions.advance(in_use=versions.parameters)
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.requires_grad:
                parameter.add_(1)
    assert {name: id(p) for name, p in module.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    for name, leaf in old.items():
        assert torch.equal(leaf, values[name])
        frozen = name.startswith("0.")
        assert torch.equal(parameters[name], values[name] + (0 if frozen else 1))
        assert (leaf.data_ptr() == parameters[name].data_ptr()) == frozen  # frozen weights need no versions
        assert leaf.requires_grad is not frozen


def test_predicted_weights_have_storage_of_their_own() -> None:
    module, versions = make()
    before = {name: p.data_ptr() for name, p in module.named_parameters()}
    predicted = torch.full((3, 5), 2.0)
    versions.predict({"3.weight": predicted})
    leaves = versions.leaves()
    assert torch.equal(leaves["3.weight"], predicted) and leaves["3.weight"].requires_grad
    assert leaves["0.weight"].data_ptr() == before["0.weight"]
    versions.advance(in_use=versions.parameters)
    moved = {name for name, p in module.named_parameters() if p.data_ptr() != before[name]}
    assert moved == before.keys() - {"3.weight"}  # a step can't write into what only predictions are used of
    assert versions.leaves()["3.weight"].data_ptr() == before["3.weight"]


def test_real_weights_in_use_outlive_a_prediction_without_a_step_between() -> None:
    """The first update after a delay warm-up has no step: its forwards are real ones, those of the next one predicted."""
    module, versions = make()
    real = versions.leaves()["3.weight"]
    value = real.detach().clone()
    versions.predict({"3.weight": torch.zeros(3, 5)})
    versions.leaves()
    versions.advance(in_use=versions.parameters)
    with torch.no_grad():
        module[3].weight.add_(1)
    assert torch.equal(real, value)


@pytest.mark.parametrize("delay", [1, 2, 5])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_gradients_under_pending_graphs(delay: int, kind: type[torch.optim.Optimizer]) -> None:
    """Backwards run `delay` optimizer steps after their forwards and equal those of a copy of the weights."""
    module, versions = make()
    optimizer = kind(module.parameters(), lr=0.1)
    pending: list[tuple[torch.Tensor, dict[str, torch.Tensor], nn.Module, torch.Tensor]] = []
    generator = torch.Generator().manual_seed(1)
    for tick in range(12):
        inputs = torch.randn(6, 4, generator=generator)
        leaves = versions.leaves()
        output = functional_call(module, leaves, (inputs,)).square().mean()
        pending.append((output, leaves, copy.deepcopy(module), inputs))
        if tick >= delay:
            output, leaves, frozen_copy, inputs = pending.pop(0)
            output.backward()
            found = gradients(leaves)
            frozen_copy(inputs).square().mean().backward()
            for name, parameter in frozen_copy.named_parameters():
                assert torch.equal(found[name], parameter.grad)
        versions.advance(in_use=versions.parameters if pending else ())
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def test_writing_in_place_without_a_new_version_is_an_error_not_a_wrong_gradient() -> None:
    """Why `advance` is needed: on the Parameter's own storage autograd refuses or computes with new weights."""
    module, _ = make()
    output = module(torch.ones(2, 4)).square().mean()
    with torch.no_grad():
        module[3].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_a_parameter_with_a_view_keeps_its_storage() -> None:
    module, versions = make()
    view = module[3].weight.data
    leaves = versions.leaves()
    assert leaves["3.weight"].data_ptr() != view.data_ptr()
    assert leaves["0.weight"].data_ptr() == module[0].weight.data_ptr()
    old = leaves["3.weight"].detach().clone()
    versions.advance(in_use=versions.parameters)
    with torch.no_grad():
        module[3].weight.add_(1)
    assert torch.equal(view, module[3].weight) and torch.equal(leaves["3.weight"], old)
    del view, leaves
    assert versions.leaves()["3.weight"].data_ptr() == module[3].weight.data_ptr()  # nobody has a view any more


def test_only_what_is_in_use_moves() -> None:
    module, versions = make()
    before = {name: p.data_ptr() for name, p in module.named_parameters()}
    versions.leaves()
    versions.advance(in_use=["3.weight"])
    assert {name for name, p in module.named_parameters() if p.data_ptr() != before[name]} == {"3.weight"}
    versions.leaves()
    versions.let_go(in_use=["0.weight"])
    assert module[0].weight.data_ptr() != before["0.weight"] and module[0].bias.data_ptr() == before["0.bias"]


def test_copies_of_frozen_weights_go_on() -> None:
    module, versions = make(frozen=True)

    def copied() -> dict[str, torch.Tensor]:
        leaves = versions.leaves()
        versions.copies.update({n: leaf.bfloat16() for n, leaf in leaves.items() if n not in versions.copies})
        versions.forgo(versions.copies)
        return dict(versions.copies)

    def kept(before: dict[str, torch.Tensor]) -> set[str]:
        return {name for name, copy in versions.copies.items() if copy is before[name]}

    frozen, before = {"0.weight", "0.bias"}, copied()
    versions.advance(in_use=versions.parameters)
    assert kept(before) == versions.copies.keys() == frozen
    assert copied()["0.weight"] is before["0.weight"]
    versions.predict({"3.weight": torch.zeros(3, 5)})
    assert kept(before) == versions.copies.keys() == frozen
    view = module[0].bias.data  # of a script, which may write by it
    versions.advance(in_use=())
    assert kept(before) == versions.copies.keys() == {"0.weight"}
    del view
    before = copied()
    versions.advance(in_use=(), stepping=["0.bias"])  # trained until a moment ago
    assert kept(before) == {"0.weight"}
    before = copied()
    module[3].weight.requires_grad_(False)  # whose copy has a graph
    versions.advance(in_use=())
    assert kept(before) == frozen
    for somebody_else_writes in (lambda: versions.let_go(in_use=versions.parameters), versions.look_again):
        copied()
        somebody_else_writes()
        assert not versions.copies
