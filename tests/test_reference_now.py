"""The reference with weights of now against its rule written out: all weight versions, all inputs, no queues."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import causal_loss, count_targets, cpu_devices, tiny_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference import DECAY, LR, MOMENTUM, Tensors, assert_equal_but_for_rounding, micro_batches, run, weights_of
from torch.func import functional_call
from trainer_helpers import EVERY

from hf_ouroboros.engine.settings import EngineSettings
from hf_ouroboros.partition import Partition, select, split_model
from hf_ouroboros.partition.ownership import parameter_places
from hf_ouroboros.reference import Reference
from hf_ouroboros.reference_now import ReferenceNow, reference_of

CPU = torch.device("cpu")


def make(tied: bool, stages: int, weights: str = "now", lr: float = LR, **options: Any) -> Reference:
    # In double precision, the order of a sum can't hide a mistake in the rule behind a tolerance.
    model = tiny_gpt2(tied).double()
    partition = split_model(model, cpu_devices(4), num_stages=stages, colocate=True, check=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=DECAY)
    options_ = EngineSettings("reference", threads=1, weights=weights, **options)
    return reference_of(options_)(partition, optimizer, causal_loss, options_)


def written_out(partition: Partition, updates: Sequence[int], warmup: int = 0) -> tuple[Tensors, list[float]]:
    """w[u] of all updates, and of each stage and tick: h, what it was given; e, the loss's product for what it was given."""
    stages = partition.stages
    last = len(stages) - 1
    names = {id(p): name for name, p in partition.model.named_parameters()}
    places = [{place: names[id(p)] for place, p in parameter_places(stage)} for stage in stages]
    batches = micro_batches(updates)
    flat = [(batch, count_targets(group)) for group in batches for batch in group]
    weights, momentum, losses = [weights_of(partition)], {}, []
    h: list[dict[int, Any]] = [{} for _ in stages]
    e: list[dict[int, Any]] = [{} for _ in stages]
    gradients: dict[tuple[int, int, str], torch.Tensor] = {}

    def f(k: int, t: int, version: Tensors, given: Any) -> Any:
        batch, targets = flat[t]
        stages[k].train()
        own = {place: version[name] for place, name in places[k].items()}
        out = functional_call(stages[k], own, (select(stages[k], batch, CPU), given, None, None), tie_weights=False)
        return causal_loss(out, batch, targets) if k == last else out

    def replay(k: int, s: int, version: Tensors) -> None:
        leaves = {name: version[name].detach().clone().requires_grad_() for name in set(places[k].values())}
        given = None if k == 0 else {n: t.detach().clone().requires_grad_() for n, t in h[k][s].items()}
        out = f(k, s, leaves, given)
        roots, products = ([out], None) if k == last else ([out[n] for n in e[k + 1][s]], [*e[k + 1][s].values()])
        inputs = [*leaves.values(), *([] if given is None else given.values())]
        found = torch.autograd.grad(roots, inputs, products)
        for name, gradient in zip(leaves, found, strict=False):
            gradients[k, s, name] = gradient
        if given is not None:
            e[k][s] = dict(zip(given, found[len(leaves) :], strict=True))

    start = sum(updates[:warmup])
    for u, ticks in enumerate(updates):
        w, a = weights[u], sum(updates[:u])
        delays = [last - k if u >= warmup else 0 for k in range(last + 1)]
        sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.double))
        seen = set()
        for t in range(a, a + ticks):
            out = None
            for k in range(last + 1):
                h[k][t] = out
                out = f(k, t, w, out)
            losses.append(float(out.detach()))
            for k in reversed(range(last + 1)):
                s = t - delays[k]
                if s >= (start if u >= warmup else 0):
                    replay(k, s, w)
        for k in range(last + 1):
            for s in range(a - delays[k], a + ticks - delays[k]):
                for name in set(places[k].values()) if s >= (start if u >= warmup else 0) else ():
                    if k == last > 0 and name in partition.tied_names:
                        continue  # it waits for the other side
                    sums[name] = sums[name] + gradients[k, s, name]
                    if k == 0 < last and name in partition.tied_names:
                        sums[name] = sums[name] + gradients[last, s, name]
                    seen.add(name)
        following = dict(w)
        for name in seen:
            g = sums[name] + DECAY * w[name]
            momentum[name] = MOMENTUM * momentum[name] + g if name in momentum else g
            following[name] = w[name] - LR * momentum[name]
        weights.append(following)
    return weights[-1], losses


@pytest.mark.parametrize(
    ("stages", "updates", "tied", "warmup"),
    [
        (2, [1] * 6, True, 0),
        (3, [3, 1, 2, 3], True, 0),  # ragged
        (4, [1] * 7, False, 2),
        (5, [1, 1], True, 0),  # shorter than the delays
    ],
)
def test_update_rule_examples(stages: int, updates: list[int], tied: bool, warmup: int) -> None:
    torch.set_num_threads(1)
    reference = make(tied, stages, delay_warmup_steps=warmup)
    expected = written_out(reference.partition, updates, warmup)
    assert_equal_but_for_rounding(expected, run(reference, updates))


@pytest.mark.slow
@settings(max_examples=15 if EVERY else 4, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans(), st.integers(0, 3))
def test_update_rule(stages: int, updates: list[int], tied: bool, warmup: int) -> None:
    torch.set_num_threads(1)
    reference = make(tied, stages, delay_warmup_steps=warmup)
    expected = written_out(reference.partition, updates, warmup)
    assert_equal_but_for_rounding(expected, run(reference, updates))


def test_two_stages_by_hand() -> None:
    """h = a x, loss = b h on two stages with a and b to be trained, plain SGD, M = 1: where now parts from then.

    Tick t reads x_t. Stage 1 (b) steps at once, by a[t] x_t. Stage 0 (a) steps a tick later: with the product e = b[t-1] of
    stage 1, its own Jacobian x_{t-1} does not depend on a. So nothing parts while each stage is linear in what it is given; with
    h = a^2 x it does: the Jacobian is 2 a x, with a of then or of now.
    """
    x, lr = [1.0, 2.0, -1.0, 0.5], 0.1
    found: dict[str, list[float]] = {}
    for weights in ("then", "now"):
        a, b, past = 1.0, 0.5, []
        for x_t in x:
            then = (a, b, x_t)
            g_a = None
            if past:
                a_then, b_then, x_then = past[-1]
                g_a = 2 * (a_then if weights == "then" else a) * x_then * b_then
            past.append(then)
            g_b = a * a * x_t
            a, b = a if g_a is None else a - lr * g_a, b - lr * g_b
        found[weights] = [a, b]
    assert found["then"] != found["now"]
    for weights, expected in found.items():
        assert two_numbers(weights, x, lr) == pytest.approx(expected, rel=1e-12)


def two_numbers(weights: str, x: list[float], lr: float) -> list[float]:
    """The same by the reference, on stages that are stood in for: their forwards are exchanged, and all else is the reference's."""
    reference = make(False, 2, weights)
    first, second = reference.partition.stages
    a, b = reference._owned[0]["transformer.wpe.weight"], reference._owned[1]["transformer.ln_f.weight"]
    reference.optimizer = torch.optim.SGD([a, b], lr=lr)
    with torch.no_grad():
        for p in reference.partition.model.parameters():
            p.requires_grad_(p is a or p is b)
        a.fill_(1.0)
        b.fill_(0.5)

    def one(batch: Any, received: Any, memory: Any, finish: Any) -> Any:
        weight = first.get_submodule("transformer.wpe").weight[0, 0]
        return {"hidden": weight * weight * batch["input_ids"].double()}

    def two(batch: Any, received: Any, memory: Any, finish: Any) -> Any:
        return (second.get_submodule("transformer.ln_f").weight[0] * received["hidden"]).sum()

    first.forward, second.forward = one, two
    for x_t in x:
        reference.submit({"input_ids": torch.tensor([[x_t]])}, None)
        reference.step()
    return [a[0, 0].item(), b[0].item()]


def test_now_parts_from_then_at_the_first_step_that_can_differ() -> None:
    """K = 2, M = 1: stage 0 takes its first step in update 1, so the gradients of update 2 are the first at other weights."""
    found = [weights_of_run(weights, 2) for weights in ("then", "now")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    found = [weights_of_run(weights, 3) for weights in ("then", "now")]
    assert {name for name in found[0] if not torch.equal(found[0][name], found[1][name])} <= STAGE_0
    assert not torch.equal(*(weights["transformer.h.0.mlp.c_fc.weight"] for weights in found))


STAGE_0 = {"transformer.wte.weight", "transformer.wpe.weight"} | {
    f"transformer.h.{i}.{name}" for i in range(3) for name in dict(tiny_gpt2().transformer.h[0].named_parameters())
}


def weights_of_run(weights: str, updates: int) -> Tensors:
    reference = make(True, 2, weights)
    run(reference, [1] * updates)
    return weights_of(reference.partition)


@pytest.mark.parametrize(("stages", "warmup"), [(1, 0), (3, 10**6)])
def test_without_delay_it_is_the_same(stages: int, warmup: int) -> None:
    then, now = (run(make(True, stages, w, delay_warmup_steps=warmup), [2, 1, 3]) for w in ("then", "now"))
    assert all(torch.equal(then[0][name], now[0][name]) for name in then[0]) and then[1] == now[1]


def test_which_reference() -> None:
    assert reference_of(EngineSettings(weights="now")) is ReferenceNow
    assert reference_of(EngineSettings()) is Reference
