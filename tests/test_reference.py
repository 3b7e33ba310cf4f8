"""The reference against the update rule (README of the package) written out with all weight versions and no stages at all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers import Batch, causal_loss, count_targets, cpu_devices, differences, make_batch, tiny_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from hf_ouroboros.engine.settings import EngineSettings
from hf_ouroboros.errors import EngineError
from hf_ouroboros.partition import Partition, split_model
from hf_ouroboros.reference import Reference

V, HEAD = "transformer.wte.weight", "lm_head.weight"
LR, MOMENTUM, DECAY = 0.3, 0.8, 0.01
Tensors = dict[str, torch.Tensor]


def micro_batches(updates: Sequence[int]) -> list[list[Batch]]:
    """The micro-batches of every update."""
    ends = [sum(updates[: u + 1]) for u in range(len(updates))]
    return [[make_batch(t, padded=True) for t in range(b - n, b)] for n, b in zip(updates, ends, strict=True)]


def make(tied: bool, stages: int, **options: object) -> Reference:
    # In double precision, the order of a sum can't hide a mistake in the rule behind a tolerance.
    model = tiny_gpt2(tied).double()
    partition = split_model(model, cpu_devices(4), num_stages=stages, colocate=True, check=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    return Reference(partition, optimizer, causal_loss, EngineSettings("reference", threads=1, **options))


def run(reference: Reference, updates: Sequence[int]) -> tuple[Tensors, list[float]]:
    """Final weights and losses."""
    for batches in micro_batches(updates):
        for batch in batches:
            reference.submit(batch, count_targets(batches))
        reference.step()
    finished = reference.collect()
    assert [loss.tick for loss in finished] == list(range(sum(updates)))
    return weights_of(reference.partition), [float(loss.loss) for loss in finished]


def weights_of(partition: Partition) -> Tensors:
    return {name: p.detach().clone() for name, p in partition.model.named_parameters()}


def stage_of(partition: Partition) -> dict[str, int]:
    """Parameter name -> the stage whose modules contain it, a tied matrix being stage 0's."""
    stages = {}
    for name in dict(partition.model.named_parameters()):
        owner = [row.stage for row in partition.plan.rows for m in row.modules if name.startswith(f"{m}.")]
        stages[name] = owner[0]
    return stages


def brute_force(
    partition: Partition, updates: Sequence[int], tied_gradient: str = "joint", warmup: int = 0
) -> tuple[Tensors, list[float]]:
    """w[u] of all updates, every gradient anew from the whole model, SGD by hand."""
    model, owner, last = partition.model, stage_of(partition), partition.plan.num_stages - 1
    batches = micro_batches(updates)
    flat = [(batch, count_targets(group), u) for u, group in enumerate(batches) for batch in group]  # v(t) = u
    weights = [weights_of(partition)]
    momentum: Tensors = {}
    known: dict[int, Tensors] = {}

    def loss(version: Tensors, t: int) -> torch.Tensor:
        batch, targets, _ = flat[t]
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        version = {HEAD: version[V], **version}
        logits = functional_call(model, version, (), {**inputs, "use_cache": False}, tie_weights=False).logits
        return causal_loss(logits, batch, targets)

    def gradients(t: int) -> Tensors:
        """Of tick t at w[v(t)], both sides of a tied matrix apart; computed when first asked for."""
        if t not in known:
            version = {n: w.clone().requires_grad_() for n, w in weights[flat[t][2]].items()}
            version.setdefault(HEAD, version[V].detach().clone().requires_grad_())
            known[t] = dict(zip(version, torch.autograd.grad(loss(version, t), [*version.values()]), strict=True))
        return known[t]

    def gradient(t: int, name: str, side: str) -> torch.Tensor:
        if side == "both" and name == V and HEAD not in owner:
            return gradients(t)[V] + gradients(t)[HEAD]
        return gradients(t)[HEAD if side == "output" else name]

    start = sum(updates[:warmup])  # the first delayed tick
    for u, ticks in enumerate(updates):
        a = sum(updates[:u])
        own, delayed = range(a, a + ticks), u >= warmup
        following = dict(weights[u])
        for name, stage in owner.items():
            delay = last - stage if delayed else 0
            window = [s - delay for s in own if s - delay >= (start if delayed else 0)]
            split = name == V and HEAD not in owner and tied_gradient == "paper" and delayed and last > 0
            terms = [gradient(s, name, "input" if split else "both") for s in window]
            if split:
                terms += [gradient(s, name, "output") for s in own]
            if not terms:
                continue
            g = sum(terms) + DECAY * weights[u][name]
            momentum[name] = MOMENTUM * momentum[name] + g if name in momentum else g
            following[name] = weights[u][name] - LR * momentum[name]
        weights.append(following)
    with torch.no_grad():
        return weights[-1], [float(loss(weights[u], t)) for t, (_, _, u) in enumerate(flat)]


def assert_equal_but_for_rounding(expected: tuple, found: tuple) -> None:
    # The window may be summed in another order: double precision leaves 1e-16 relative to the largest term.
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert found[1] == pytest.approx(expected[1], rel=1e-11)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(["joint", "paper"]),
    st.integers(0, 3),
)
def test_update_rule(stages: int, updates: list[int], tied: bool, tied_gradient: str, warmup: int) -> None:
    torch.set_num_threads(1)
    reference = make(tied, stages, tied_gradient=tied_gradient, delay_warmup_steps=warmup)
    expected = brute_force(reference.partition, updates, tied_gradient, warmup)
    assert_equal_but_for_rounding(expected, run(reference, updates))


@pytest.mark.slow
@pytest.mark.parametrize("tied_gradient", ["joint", "paper"])
@pytest.mark.parametrize(
    ("stages", "updates", "warmup"),
    [
        (3, [1] * 6, 0),  # the paper's Algorithm 1
        (4, [2, 2, 2, 2], 0),
        (3, [3, 1, 2, 3], 0),  # ragged
        (4, [1, 1, 1, 1, 1, 1], 2),  # after the warm-up, nothing is applied twice and nothing from before it
        (5, [1, 1], 0),  # shorter than the delays
    ],
)
def test_update_rule_examples(stages: int, updates: list[int], warmup: int, tied_gradient: str) -> None:
    torch.set_num_threads(1)
    reference = make(True, stages, tied_gradient=tied_gradient, delay_warmup_steps=warmup)
    expected = brute_force(reference.partition, updates, tied_gradient, warmup)
    assert_equal_but_for_rounding(expected, run(reference, updates))


@pytest.mark.parametrize("warmup", [0, 10**6])
@pytest.mark.parametrize("tied_gradient", ["joint", "paper"])
def test_one_stage_is_plain_training(warmup: int, tied_gradient: str) -> None:
    updates = [2, 2, 1, 3]
    found = run(make(True, 1, tied_gradient=tied_gradient, delay_warmup_steps=warmup), updates)
    assert_plain_training(updates, found, None)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_all_updates_warm_up_is_plain_training(stages: int) -> None:
    updates = [2, 2, 1, 3]
    found = run(make(True, stages, delay_warmup_steps=10**6), updates)
    assert_plain_training(updates, found, None)


def test_global_clipping_is_torchs() -> None:
    updates = [2, 2, 1, 3]
    settings_ = dict(delay_warmup_steps=10**6, max_grad_norm=0.5, clip_scope="global")
    assert_plain_training(updates, run(make(True, 1, **settings_), updates), 0.5)
    model = tiny_gpt2().double()
    # Several stages: the norm of norms instead of the norm of all parameters.
    expected = plain_training(model, updates, 0.5)
    assert_equal_but_for_rounding(expected, run(make(True, 4, **settings_), updates))


def plain_training(
    model: torch.nn.Module, updates: Sequence[int], max_norm: float | None
) -> tuple[Tensors, list[float]]:
    """The loop of every tutorial."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    losses = []
    for batches in micro_batches(updates):
        for batch in batches:
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = causal_loss(logits, batch, count_targets(batches))
            loss.backward()
            losses.append(float(loss.detach()))
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, losses


def assert_plain_training(updates: Sequence[int], found: tuple, max_norm: float | None) -> None:
    torch.set_num_threads(1)
    expected = plain_training(tiny_gpt2().double(), updates, max_norm)
    assert differences(expected[0], found[0]) == []
    assert found[1] == expected[1]


def test_stage_clipping_bounds_each_stage_and_the_whole() -> None:
    """One SGD step of learning rate 1 shows the clipped gradient."""
    model = tiny_gpt2().double()
    partition = split_model(model, cpu_devices(2), num_stages=3, colocate=True, check=False)
    before = weights_of(partition)
    reference = Reference(
        partition,
        torch.optim.SGD(model.parameters(), lr=1.0),
        causal_loss,
        EngineSettings("reference", max_grad_norm=0.03, delay_warmup_steps=9),
    )
    reference.submit(make_batch(0))
    reference.step()
    norms = []
    for k in range(3):
        change = [(before[n] - p.detach()).flatten() for n, p in partition.owned(k).items()]
        norms.append(float(torch.cat(change).norm()))
    assert all(norm <= 0.03 / 3**0.5 * (1 + 1e-9) for norm in norms)  # rounding of the scaled gradient
    assert norms == pytest.approx([0.03 / 3**0.5] * 3, rel=1e-3)  # clip_grad_norm_ adds 1e-6 to the norm
    assert sum(norm**2 for norm in norms) ** 0.5 <= 0.03 * (1 + 1e-9)
    assert reference.grad_norm > 0.03  # before clipping


def test_empty_window_is_no_step_at_all() -> None:
    """No decay, no momentum, no optimizer state."""
    reference = make(False, 4)
    before = weights_of(reference.partition)
    run(reference, [1, 1])
    owner = stage_of(reference.partition)
    for name, parameter in reference.partition.model.named_parameters():
        untouched = owner[name] < 2  # delays 3 and 2
        assert torch.equal(parameter, before[name]) is untouched
        assert (parameter in reference.optimizer.state) is not untouched


def test_step_needs_a_micro_batch() -> None:
    reference = make(True, 3)
    for _ in range(2):
        with pytest.raises(EngineError, match="without a micro-batch"):
            reference.step()
        reference.submit(make_batch(0))
        with pytest.raises(EngineError, match="between updates"):
            reference.state_dict()
        reference.step()


def test_no_gradient_is_left_behind() -> None:
    reference = make(True, 3)
    run(reference, [2, 1])
    assert all(p.grad is None for p in reference.partition.model.parameters())


def test_threads_are_put_back() -> None:
    torch.set_num_threads(2)
    run(make(True, 2), [1])
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
