"""Dropout that depends on (seed, stage, tick) alone, and attention with it."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import make_batch, tiny_gpt2
from torch import nn

from hf_ouroboros.engine.randomness import has_dropout, mask_seed, seeded_dropout

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def seeded(seed: int = 0, stage: int = 0, tick: int = 0) -> Any:
    return seeded_dropout(seed, stage, tick, CPU)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


# ---- seeds and masks ----


def test_mask_seeds_differ() -> None:
    seeds = {mask_seed(*triple) for triple in itertools.product(range(5), range(8), range(200))}
    assert len(seeds) == 5 * 8 * 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mask_seed(1, 2, 34) != mask_seed(1, 23, 4) != mask_seed(12, 3, 4)


def test_masks_repeat_and_differ() -> None:
    ones = torch.ones(64, 64)

    def draw(*triple: int) -> torch.Tensor:
        with seeded(*triple):
            return torch.cat([F.dropout(ones, 0.5), nn.Dropout(0.5)(ones)])

    base = draw(1, 2, 3)
    assert torch.equal(base, draw(1, 2, 3))
    assert not torch.equal(base[:64], base[64:])
    for other in [(0, 2, 3), (1, 1, 3), (1, 2, 4)]:
        assert not torch.equal(base, draw(*other))


def test_threads_do_not_disturb_each_other() -> None:
    """Two stages that draw in turns get the masks that each would get alone."""
    model = tiny_gpt2(dropout=0.3).train()
    ids = make_batch(0)["input_ids"]

    def forward(stage: int) -> list[torch.Tensor]:
        found = []
        for tick in range(4):
            with seeded(0, stage, tick), torch.no_grad():
                found.append(model(ids).logits)
        return found

    alone = [forward(stage) for stage in range(2)]
    together: list[list[torch.Tensor]] = [[], []]
    turn = threading.Barrier(2)

    def work(stage: int) -> None:
        torch.set_num_threads(1)
        hidden = torch.ones(1000)
        for tick in range(4):
            with seeded(0, stage, tick), torch.no_grad():
                turn.wait(30)
                together[stage].append(model(ids).logits)
                turn.wait(30)
                F.dropout(hidden, 0.5)  # both are inside their contexts now

    threads = [threading.Thread(target=work, args=(stage,)) for stage in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for stage in range(2):
        assert all(torch.equal(a, b) for a, b in zip(alone[stage], together[stage], strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])


def test_interleaved_draws() -> None:
    """The same, mask by mask: a barrier before every draw."""
    ones, turn = torch.ones(50), threading.Barrier(2)
    drawn: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(stage: int, wait: bool = True) -> list[torch.Tensor]:
        found = []
        with seeded(5, stage, 9):
            for _ in range(20):
                if wait:
                    turn.wait(30)
                found.append(F.dropout(ones, 0.5))
        drawn[stage] = found
        return found

    threads = [threading.Thread(target=work, args=(stage,)) for stage in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = dict(drawn)
    for stage in range(2):
        assert all(torch.equal(a, b) for a, b in zip(found[stage], work(stage, wait=False), strict=True))


def test_global_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    query, key, value = tensors((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8))
    with seeded():
        F.dropout(torch.ones(100), 0.5)
        F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
        tiny_gpt2_logits = nn.Dropout(0.1)(torch.ones(10))
    assert tiny_gpt2_logits.shape == (10,)
    assert torch.equal(torch.get_rng_state(), before)


def test_outside_the_context_torch_draws_as_ever() -> None:
    torch.manual_seed(3)
    expected = F.dropout(torch.ones(100), 0.5)
    torch.manual_seed(3)
    with seeded():
        F.dropout(torch.ones(100), 0.5)
    assert torch.equal(F.dropout(torch.ones(100), 0.5), expected)


# ---- F.dropout ----


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_statistics(p: float) -> None:
    with seeded():
        out = F.dropout(torch.ones(200_000), p)
    kept = out != 0
    assert torch.equal(out[kept], torch.full_like(out[kept], 1) / torch.tensor(1 - p))
    # Six standard deviations of a binomial; the seed is fixed, so this does not flicker.
    assert abs(kept.double().mean() - (1 - p)) < 6 * math.sqrt(p * (1 - p) / 200_000)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False), (1.0, False)])
def test_no_dropout(p: float, training: bool) -> None:
    ones = torch.ones(50)
    with seeded():
        assert torch.equal(F.dropout(ones, p, training), ones)


def test_dropping_everything() -> None:
    ones = torch.ones(50, requires_grad=True)
    with seeded():
        out = F.dropout(ones, 1.0)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(50)) and torch.equal(ones.grad, torch.zeros(50))


def test_gradient_uses_the_mask() -> None:
    (inputs,) = tensors((40,))
    with seeded():
        out = F.dropout(inputs, 0.5)
    out.sum().backward()
    assert torch.equal(inputs.grad, (out != 0).double() * 2)


def test_in_place() -> None:
    inputs = torch.ones(40)
    with seeded():
        expected = F.dropout(torch.ones(40), 0.5)
    with seeded():
        assert F.dropout(inputs, 0.5, inplace=True) is inputs
    assert torch.equal(inputs, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    with seeded():
        assert F.dropout(torch.ones(4, dtype=dtype), 0.5).dtype == dtype


# ---- attention ----

NEARLY_ZERO = 1e-12  # takes the path with dropout, drops nothing


def masks() -> dict[str, dict[str, Any]]:
    boolean = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    boolean[..., 0] = True
    additive = torch.zeros(boolean.shape, dtype=torch.float64).masked_fill(~boolean, -torch.inf)
    lowest = torch.zeros(boolean.shape, dtype=torch.float64).masked_fill(~boolean, torch.finfo(torch.float64).min)
    bias = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": boolean},
        "additive": {"attn_mask": additive},
        "lowest": {"attn_mask": lowest},
        "bias": {"attn_mask": bias},
        "scale": {"scale": 0.3},
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_equals_torchs(mask: str, kv_heads: int) -> None:
    options = masks()[mask] | ({"enable_gqa": True} if kv_heads != 4 else {})
    inputs = tensors((2, 4, 5, 8), (2, kv_heads, 6, 8), (2, kv_heads, 6, 8))
    expected = F.scaled_dot_product_attention(*inputs, **options)
    with seeded():
        found = F.scaled_dot_product_attention(*inputs, dropout_p=NEARLY_ZERO, **options)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((expected * weights).sum(), inputs),
        torch.autograd.grad((found * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)  # torch's kernels sum in another order
    torch.testing.assert_close(found, expected)


def test_attention_drops_probabilities() -> None:
    """softmax(qk) with the context's own mask, times v."""
    query, key, value = tensors((2, 3, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8))
    with seeded(1):
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=0.4)
    with seeded(1):
        expected = F.dropout(torch.softmax(query @ key.mT / math.sqrt(8), -1), 0.4) @ value
    torch.testing.assert_close(found, expected)  # scaled before or after the product
    with seeded(2):
        assert not torch.equal(found, F.scaled_dot_product_attention(query, key, value, None, 0.4))


def test_attention_is_unbiased() -> None:
    query, key, value = (t.detach() for t in tensors((1, 1, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4)))
    exact = F.scaled_dot_product_attention(query, key, value)
    drawn = []
    for tick in range(2000):
        with seeded(tick=tick):
            drawn.append(F.scaled_dot_product_attention(query, key, value, dropout_p=0.3))
    stacked = torch.stack(drawn)
    # Six standard errors of the mean; fixed seeds.
    assert ((stacked.mean(0) - exact).abs() <= 6 * stacked.std(0) / math.sqrt(2000)).all()


def test_without_dropout_the_fused_kernel_runs() -> None:
    query, key, value = tensors((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), dtype=torch.float32)
    with seeded():
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(found, F.scaled_dot_product_attention(query, key, value, is_causal=True))


@pytest.mark.parametrize("additive", [None, torch.finfo(torch.float32).min, -torch.inf])
def test_rows_without_any_key_give_finite_gradients(additive: float | None) -> None:
    inputs = tensors((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), dtype=torch.float32)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[:, 0] = False  # left padding: the first row sees nothing
    if additive is not None:
        mask = torch.zeros(4, 4).masked_fill(~mask, additive)
    with seeded():
        out = F.scaled_dot_product_attention(*inputs, attn_mask=mask, dropout_p=0.1)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)


def test_model_trains_with_left_padding_and_dropout() -> None:
    model = tiny_gpt2(dropout=0.2).train()
    ids = make_batch(0)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with seeded():
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- has_dropout ----


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), False),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), True),
        (nn.Sequential(nn.Dropout(0.0)), False),
        (nn.Dropout1d(0.2), True),
    ],
)
def test_has_dropout(module: nn.Module, expected: bool) -> None:
    assert has_dropout(module) is expected


def test_has_dropout_in_gpt2() -> None:
    assert not has_dropout(tiny_gpt2())
    assert has_dropout(tiny_gpt2(attn_pdrop=0.1))
    assert has_dropout(tiny_gpt2(embd_pdrop=0.1))
