"""One stage at work: exact gradients under later steps, replayed forwards, windows, clipping, tied matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import causal_loss, cpu_devices, make_batch, tiny_gpt2

from hf_ouroboros.engine.optimizers import StageOptimizer, snapshot_hyperparameters
from hf_ouroboros.engine.settings import EngineSettings
from hf_ouroboros.engine.stage_runner import StageRunner
from hf_ouroboros.engine.weights import TiedLink
from hf_ouroboros.partition import Partition, split_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(
    tied: bool = True, dropout: float = 0.0, counts: tuple[int, ...] = (2, 2, 1), **settings: Any
) -> tuple[Partition, torch.optim.Optimizer, list[StageRunner]]:
    model = tiny_gpt2(tied, dropout=dropout).train()
    partition = split_model(model, cpu_devices(len(counts)), list(counts), check=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    link = TiedLink(partition.tied_names) if tied else None
    stages = range(len(counts))
    runners = [StageRunner(partition, k, CPU, causal_loss, EngineSettings(**settings), link) for k in stages]
    for k, runner in enumerate(runners):
        runner.optimizer = StageOptimizer(optimizer, partition.owned(k).values())
    return partition, optimizer, runners


def forward(runners: list[StageRunner], tick: int) -> torch.Tensor:
    """All stages in turn; the loss."""
    hidden = None
    for runner in runners:
        hidden = runner.forward(tick, make_batch(tick), None, hidden)
    return hidden


def backward(runners: list[StageRunner], tick: int) -> dict[str, torch.Tensor]:
    """All stages in turn; the gradients of all parameters."""
    found: dict[str, torch.Tensor] = {}
    gradient = None
    for runner in reversed(runners):
        own, gradient = runner.backward(tick, gradient)
        assert not found.keys() & own.keys()
        found |= own
    return found


def step(runners: list[StageRunner], optimizer: torch.optim.Optimizer) -> None:
    for runner in runners:
        runner.step(snapshot_hyperparameters(optimizer), 0)


def exact(model: torch.nn.Module, tick: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a copy of the whole model."""
    twin = copy.deepcopy(model)
    batch = make_batch(tick)
    loss = causal_loss(twin(batch["input_ids"], use_cache=False).logits, batch, None)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in twin.named_parameters()}


def assert_equal(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_weights_of_the_forward(tied: bool, recompute: bool) -> None:
    """Backwards run three steps after their forwards."""
    partition, optimizer, runners = make(tied, recompute=recompute)
    expected = {}
    for tick in range(8):
        expected[tick] = exact(partition.model, tick)
        assert torch.equal(forward(runners, tick), expected[tick][0])
        if tick >= 3:
            found = backward(runners, tick - 3)
            assert_equal(expected.pop(tick - 3)[1], found)
            for runner in runners:
                runner.accumulate({n: found[n].clone() for n in found if n in partition.owned(runner.index)})
        before = partition.model.state_dict()["transformer.wpe.weight"].clone()
        step(runners, optimizer)
        assert torch.equal(before, partition.model.transformer.wpe.weight) is (tick < 3)
    assert all(sorted(runner.in_flight) == [5, 6, 7] for runner in runners)


@pytest.mark.parametrize("tied", [True, False])
def test_replayed_forward_is_the_same(tied: bool) -> None:
    """recompute: with dropout, after steps, with the stage in evaluation mode in between."""
    kept, replayed = (make(tied, dropout=0.3, recompute=r) for r in (False, True))
    for partition, optimizer, runners in (kept, replayed):
        for tick in range(3):
            forward(runners, tick)
        backward(runners, 0)
        for runner in runners:
            runner.accumulate({n: torch.ones_like(p) for n, p in partition.owned(runner.index).items()})
        step(runners, optimizer)
        for runner in runners:
            runner.stage.eval()
    assert all(item.output is None for runner in replayed[2][:-1] for item in runner.in_flight.values())
    for tick in (1, 2):
        assert_equal(backward(kept[2], tick), backward(replayed[2], tick))


def test_evaluation_mode_does_not_reach_training() -> None:
    """A model put to eval() between ticks: the next forward is a training forward."""
    partition, _, runners = make(dropout=0.3)
    first = forward(runners, 0)
    partition.model.eval()
    for runner in runners:
        runner.stage.eval()
    for runner in runners:
        runner.in_flight.clear()
    assert torch.equal(forward(runners, 0), first)


def test_dropout_goes_by_seed_stage_and_tick() -> None:
    _, _, runners = make(dropout=0.3)
    _, _, others = make(dropout=0.3, seed=1)
    torch.manual_seed(1)
    a = forward(runners, 0)
    torch.manual_seed(2)
    assert not torch.equal(a, forward(others, 0))
    _, _, again = make(dropout=0.3)
    assert torch.equal(a, forward(again, 0))


def test_global_generator_is_untouched() -> None:
    _, _, runners = make(dropout=0.3, recompute=True)
    before = torch.get_rng_state()
    forward(runners, 0)
    backward(runners, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_outputs_carry_no_graph() -> None:
    _, _, runners = make()
    state = None
    for runner in runners:
        state = runner.forward(0, make_batch(0), None, state)
        tensors = [state] if torch.is_tensor(state) else list(state.values())
        assert tensors and all(not t.requires_grad and t.grad_fn is None for t in tensors)
    gradients, upstream = runners[2].backward(0, None)
    assert upstream.keys() == {"hidden"}
    assert all(not g.requires_grad for g in (*upstream.values(), *gradients.values()))


def test_parameters_get_no_gradients() -> None:
    partition, _, runners = make()
    forward(runners, 0)
    backward(runners, 0)
    assert all(p.grad is None for p in partition.model.parameters())


def test_window_is_a_sum_and_closes_with_the_step() -> None:
    partition, optimizer, runners = make(tied=False)
    before = {n: p.detach().clone() for n, p in partition.owned(1).items()}
    gradients = []
    for tick in range(3):
        forward(runners, tick)
        gradients.append(backward(runners, tick))
        runners[1].accumulate({n: gradients[-1][n].clone() for n in before})
    step(runners, optimizer)
    for name, parameter in partition.owned(1).items():
        total = gradients[0][name] + gradients[1][name] + gradients[2][name]
        assert torch.equal(parameter, before[name] - 0.5 * total)
    assert runners[1].window == {}


def test_empty_window_is_no_step() -> None:
    partition, optimizer, runners = make()
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in partition.model.named_parameters()}
    forward(runners, 0)
    step(runners, optimizer)
    for name, parameter in partition.model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])
    assert not optimizer.state
    assert runners[0].norm() is None


@pytest.mark.parametrize("bound", [1e-3, 1.0, 1e6, float("inf")])
def test_clip_is_torchs(bound: float) -> None:
    partition, _, runners = make()
    forward(runners, 0)
    gradients = backward(runners, 0)
    for runner in runners:
        owned = partition.owned(runner.index)
        runner.accumulate({n: gradients[n].clone() for n in owned})
        for name, parameter in owned.items():
            parameter.grad = gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(owned.values(), bound)
        assert (found := runner.norm()) is not None and torch.equal(found, norm)
        runner.scale(found, bound)
        assert_equal({n: p.grad for n, p in owned.items()}, runner.window)


def test_tied_matrix_stays_at_the_version_of_stage_0() -> None:
    """Stage 0 steps between its forward and the last stage's; the last stage's forward does not notice."""
    partition, optimizer, runners = make()
    expected, gradients = exact(partition.model, 0)
    hidden = runners[0].forward(0, make_batch(0), None, None)
    runners[0].accumulate({n: torch.ones_like(p) for n, p in partition.owned(0).items()})
    runners[0].step(snapshot_hyperparameters(optimizer), 0)
    hidden = runners[1].forward(0, make_batch(0), None, hidden)
    assert torch.equal(runners[2].forward(0, make_batch(0), None, hidden), expected)
    assert_equal(gradients, backward(runners, 0))


def test_output_side_of_the_tied_matrix_alone() -> None:
    """tied_gradient="paper": the head's gradient is taken at once, the embedding's comes with stage 0's backward."""
    _, _, runners = make()
    forward(runners, 0)
    _, upstream = runners[2].backward(0, None)
    runners[0].add_output_side(0)
    output_side = runners[0].window.pop("transformer.wte.weight")
    _, upstream = runners[1].backward(0, upstream)
    own, _ = runners[0].backward(0, upstream)
    _, whole = exact(make()[0].model, 0)
    assert torch.equal(output_side + own["transformer.wte.weight"], whole["transformer.wte.weight"])
    runners[0].add_output_side(0)  # nothing is left
    assert runners[0].window == {}


@pytest.mark.parametrize("frozen", ["transformer.h.2", "transformer.wpe", "transformer.wte", "transformer"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_frozen_parts(frozen: str, tied: bool, recompute: bool) -> None:
    model = tiny_gpt2(tied)
    model.get_submodule(frozen).requires_grad_(False)
    if tied and frozen == "transformer":
        model.transformer.ln_f.requires_grad_(True)
    partition = split_model(model, cpu_devices(3), [2, 1, 2], check=False)
    link = TiedLink(partition.tied_names) if tied else None
    settings = EngineSettings(recompute=recompute)
    runners = [StageRunner(partition, k, CPU, causal_loss, settings, link) for k in range(3)]
    loss, gradients = exact(model, 0)
    assert torch.equal(forward(runners, 0), loss)
    assert_equal({n: g for n, g in gradients.items() if g is not None}, backward(runners, 0))


def test_autocast() -> None:
    _, _, runners = make(autocast_dtype=torch.bfloat16)
    hidden = runners[0].forward(0, make_batch(0), None, None)
    hidden = runners[1].forward(0, make_batch(0), None, hidden)
    loss = runners[2].forward(0, make_batch(0), None, hidden)
    assert loss.dtype == torch.float32
    gradients = backward(runners, 0)
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    partition, _, full = make()
    assert not torch.equal(loss, forward(full, 0))  # it did compute in half precision
