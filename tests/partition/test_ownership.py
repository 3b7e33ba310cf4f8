"""Letting go of the parameters that a process does not own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from helpers import make_batch, make_optimizer, tiny_gpt2
from torch import nn

from hf_ouroboros.errors import UnsupportedModelError
from hf_ouroboros.partition.ownership import check_owned, names_of_parameters, release_foreign

FIRST = ("transformer.wte.", "transformer.wpe.", "transformer.h.0.")


def first(name: str) -> bool:
    return name.startswith(FIRST)


def test_a_tied_matrix_is_one_parameter_with_two_names() -> None:
    model = tiny_gpt2()
    names = {names for _, names in names_of_parameters(model)}
    assert ("transformer.wte.weight", "lm_head.weight") in names
    assert len(names) == len(list(model.parameters()))


@pytest.mark.parametrize("owned", [first, lambda name: not first(name), lambda name: name == "lm_head.weight"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_objects_and_owned_values_stay(tied: bool, owned: Callable[[str], bool]) -> None:
    model, whole = tiny_gpt2(tied), tiny_gpt2(tied)
    optimizer = make_optimizer("sgd", model)
    objects = dict(model.named_parameters(remove_duplicate=False))
    model(**make_batch(0)).loss.backward()
    grads = {name: parameter.grad for name, parameter in objects.items()}

    assert release_foreign(model, owned) == ()

    mine = {name for _, names in names_of_parameters(whole) if any(map(owned, names)) for name in names}
    values = dict(whole.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is objects[name]
        assert type(parameter) is nn.Parameter and parameter.requires_grad
        assert (parameter.shape, parameter.dtype) == (values[name].shape, values[name].dtype)
        assert parameter.is_meta == (name not in mine)
        if name in mine:
            assert torch.equal(parameter, values[name])
            assert parameter.grad is grads[name]
        else:
            assert parameter.grad is None
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    check_owned(model, owned)


def test_memory_is_freed() -> None:
    model = tiny_gpt2()
    storage = weakref.ref(model.transformer.h[1].mlp.c_fc.weight.untyped_storage())
    freed = []
    weakref.finalize(storage(), freed.append, True)
    release_foreign(model, first)
    gc.collect()
    assert freed


def test_buffers_frozen_parameters_and_notes_stay() -> None:
    model = tiny_gpt2()
    model.register_buffer("steps", torch.arange(3))
    frozen = model.transformer.ln_f.weight.requires_grad_(False)
    frozen.note = "kept"
    release_foreign(model, first)
    assert torch.equal(model.steps, torch.arange(3))
    assert frozen.is_meta and not frozen.requires_grad and frozen.note == "kept"


@pytest.mark.parametrize("hold", [weakref.ref, lambda parameter: parameter.view(-1)])
def test_a_parameter_that_somebody_holds_becomes_a_new_object_and_is_reported(hold: Callable) -> None:
    model = tiny_gpt2()
    old = model.lm_head.weight
    old.grad = torch.ones_like(old)
    held = hold(old)
    assert release_foreign(model, lambda name: name.startswith("transformer.h.")) == (
        "transformer.wte.weight",
        "lm_head.weight",
    )
    assert held is not None and not old.is_meta
    assert old.grad is None
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.is_meta


def test_a_second_release_does_nothing() -> None:
    model = tiny_gpt2()
    release_foreign(model, first)
    before = list(model.parameters())
    assert release_foreign(model, first) == ()
    assert [id(p) for p in before] == [id(p) for p in model.parameters()]


def test_check_names_what_is_wrong() -> None:
    model = tiny_gpt2()
    with pytest.raises(UnsupportedModelError, match=r"transformer.h.1.ln_1.weight has values, but .* does not own it"):
        check_owned(model, first)
    release_foreign(model, first)
    with pytest.raises(UnsupportedModelError, match=r"transformer.ln_f.weight has no values, but this process owns it"):
        check_owned(model, lambda name: first(name) or name == "transformer.ln_f.weight")
    model.register_buffer("steps", torch.empty(3, device="meta"))
    with pytest.raises(UnsupportedModelError, match="the buffer steps has no values"):
        check_owned(model, first)
