"""Stage optimizers: together they are the complete optimizer, state and learning rates included."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from helpers import clone, cpu_devices, differences, make_optimizer, tiny_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ouroboros.engine.optimizers import StageOptimizer, check_optimizer, snapshot_hyperparameters
from hf_ouroboros.errors import UnsupportedOptionError
from hf_ouroboros.optim import StageUpdate
from hf_ouroboros.partition import split_model

ON_TIME = StageUpdate(0.0, 0)
OPTIMIZERS = ["sgd", "adamw", "nadam", "adafactor"]


def random_gradients(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def staged(name: str, stages: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, list[Any], list[Any]]:
    model = tiny_gpt2()
    partition = split_model(model, cpu_devices(max(1, stages - 1)), num_stages=stages, check=False)
    optimizer = make_optimizer(name, model)
    owned = [partition.owned(k) for k in range(stages)]
    return model, optimizer, owned, [StageOptimizer(optimizer, o.values()) for o in owned]


def step_stage(slice_: StageOptimizer, owned: dict[str, Any], gradients: dict[str, Any], hyper: Any) -> None:
    slice_.step([(p, gradients[name].clone()) for name, p in owned.items() if name in gradients], hyper, ON_TIME)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(OPTIMIZERS), st.integers(1, 5), st.randoms(use_true_random=False), st.booleans())
def test_stages_equal_the_whole(name: str, stages: int, random: Any, scheduled: bool) -> None:
    """In any order of stages, with a learning rate schedule, with stages left out."""
    whole = tiny_gpt2()
    expected = make_optimizer(name, whole)
    model, optimizer, owned, slices = staged(name, stages)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (expected, optimizer)] if scheduled else []
    for update in range(4):
        left_out = {random.randrange(stages)} if update % 2 else set()
        gradients = {
            n: g for n, g in random_gradients(model, update).items() if not any(n in owned[k] for k in left_out)
        }
        for n, p in whole.named_parameters():
            p.grad = gradients[n].clone() if n in gradients else None
        expected.step()
        hyper = snapshot_hyperparameters(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the scheduler did not see the complete optimizer step
            for scheduler in schedulers:
                scheduler.step()  # before the stages step: they go by the snapshot
        order = list(range(stages))
        random.shuffle(order)
        for k in order:
            if k not in left_out:
                step_stage(slices[k], owned[k], gradients, hyper)
    assert differences(whole.state_dict(), model.state_dict()) == []
    assert differences(expected.state_dict(), optimizer.state_dict()) == []
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_is_the_stock_one_and_loads(name: str) -> None:
    model, optimizer, owned, slices = staged(name, 3)
    hyper = snapshot_hyperparameters(optimizer)
    for k in range(3):
        step_stage(slices[k], owned[k], random_gradients(model, 0), hyper)
    stock = make_optimizer(name, tiny_gpt2())
    stock.load_state_dict(clone(optimizer.state_dict()))
    assert differences(optimizer.state_dict(), stock.state_dict()) == []

    other, loaded, other_owned, _ = staged(name, 4)  # resumed with another split
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(clone(optimizer.state_dict()))
    again = [StageOptimizer(loaded, o.values()) for o in other_owned]
    for k in range(3):
        step_stage(slices[k], owned[k], random_gradients(model, 1), hyper)
    for k in range(4):
        step_stage(again[k], other_owned[k], random_gradients(model, 1), hyper)
    assert differences(model.state_dict(), other.state_dict()) == []
    assert differences(optimizer.state_dict(), loaded.state_dict()) == []


def test_stages_step_at_the_same_time() -> None:
    """Threads add their parameters' state to one dict."""
    whole = tiny_gpt2()
    expected = make_optimizer("adamw", whole)
    model, optimizer, owned, slices = staged("adamw", 5)
    hyper = snapshot_hyperparameters(optimizer)

    def train(k: int) -> None:
        for update in range(20):
            step_stage(slices[k], owned[k], random_gradients(model, update), hyper)

    threads = [threading.Thread(target=train, args=(k,)) for k in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for update in range(20):
        for n, p in whole.named_parameters():
            p.grad = random_gradients(whole, update)[n]
        expected.step()
    assert differences(whole.state_dict(), model.state_dict()) == []
    assert differences(expected.state_dict(), optimizer.state_dict()) == []


def test_a_schedulers_wrapper_is_not_stepped() -> None:
    """torch's schedulers wrap `optimizer.step` of the instance; a slice must not call the complete optimizer."""
    model, optimizer, _, _ = staged("sgd", 3)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    partition = split_model(model, cpu_devices(2), num_stages=3, check=False)
    before = clone(model.state_dict())
    owned = partition.owned(1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # of stages whose turn it is not
    hyper = snapshot_hyperparameters(optimizer)
    step_stage(StageOptimizer(optimizer, owned.values()), owned, random_gradients(model, 0), hyper)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(owned)


def test_snapshot_is_independent() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], lr=torch.tensor(0.5))
    snapshot = snapshot_hyperparameters(optimizer)
    optimizer.param_groups[0]["lr"].fill_(0.1)
    assert snapshot[0]["lr"] == 0.5 and "params" not in snapshot[0]


def test_parameters_outside_the_optimizer_are_left_alone() -> None:
    model = tiny_gpt2()
    optimizer = torch.optim.SGD([model.lm_head.weight], lr=1.0)
    owned = split_model(model, cpu_devices(2), check=False).owned(1)
    before = clone(model.state_dict())
    slice_ = StageOptimizer(optimizer, owned.values())
    step_stage(slice_, owned, random_gradients(model, 0), snapshot_hyperparameters(optimizer))
    assert differences(before, model.state_dict()) == []


# ---- refusals ----


class ScheduleFree(torch.optim.SGD):
    """Has the two methods by which schedule-free optimizers swap their weights."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), "LBFGS re-evaluates the whole model"),
        (lambda model: ScheduleFree(model.parameters(), lr=0.1), "ScheduleFree swaps the weights .*schedule-free"),
        (lambda model: torch.optim.SGD(tiny_gpt2().parameters(), lr=0.1), "SGD holds parameters that are not the"),
        (
            lambda model: torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=0.1),
            "SGD holds parameters that are not the model's",
        ),
    ],
)
def test_refused(make: Any, message: str) -> None:
    model = tiny_gpt2()
    with pytest.raises(UnsupportedOptionError, match=message):
        check_optimizer(make(model), model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accepted(name: str) -> None:
    model = tiny_gpt2()
    check_optimizer(make_optimizer(name, model), model.parameters())
    check_optimizer(torch.optim.SGD([model.lm_head.weight], lr=0.1), model.parameters())
