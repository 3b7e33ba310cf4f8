"""Memory and masks: segments, starts, padding, windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transfo_xl_cases import KINDS, tiny_config, tiny_model, tokens

from hf_ouroboros.models.transfo_xl import TransfoXLLMHeadModel, TransfoXLMemory
from hf_ouroboros.models.transfo_xl.context import attention_context, relative_positions, valid_keys
from hf_ouroboros.models.transfo_xl.recurrent_memory import extended, initial_memory

# The same sums in other orders, float32, log-probabilities of some units; zero rows would change them by 0.1.
CLOSE = dict(atol=1e-5, rtol=1e-5)


def in_segments(model: TransfoXLLMHeadModel, ids: torch.Tensor, lengths: list[int], **inputs: Any) -> torch.Tensor:
    logits, mems, start = [], inputs.pop("mems", None), 0
    for length in lengths:
        piece = slice(start, start + length)
        output = model(ids[:, piece], mems=mems, **{name: value[:, piece] for name, value in inputs.items()})
        logits.append(output.logits)
        mems, start = output.mems, start + length
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", ([1] * 12, [3] * 4, [5, 1, 6], [7, 5]))
def test_segments_of_any_length_are_one_text(kind: str, lengths: list[int]) -> None:
    """With a memory for the whole text, or with same_length, where every position sees as much in any segment."""
    window = KINDS[kind].get("same_length", False)
    model = tiny_model(**{**KINDS[kind], "mem_len": 6 if window else 12})
    ids = tokens(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(in_segments(model, ids, lengths), in_segments(model, ids, [12]), **CLOSE)


def test_attended_zeros_depend_on_segments() -> None:
    model, ids = tiny_model(mem_init="zeros", mem_len=12), tokens(2, 12)
    with torch.no_grad():
        difference = (in_segments(model, ids, [3] * 4) - in_segments(model, ids, [12])).abs().max()
    assert difference > 0.01


@pytest.mark.parametrize("mem_init", ("masked", "zeros"))
def test_no_memory_is_the_initial_memory(mem_init: str) -> None:
    model, ids = tiny_model(mem_init=mem_init), tokens(2, 5)
    start = initial_memory(model.config, 2, 2, torch.float32, torch.device("cpu"))
    given, none = model(ids, mems=start), model(ids)
    torch.testing.assert_close(given.logits, none.logits, **CLOSE)
    assert all(state.shape == (2, 6, 8) for state in none.mems)
    if mem_init == "masked":
        assert none.mems.valid.tolist() == given.mems.valid.tolist() == [[False] + [True] * 5] * 2
        assert (none.mems[0][:, 0] == 0).all()
    else:
        assert none.mems.valid is None


def test_without_memory() -> None:
    model, ids = tiny_model(mem_len=0, same_length=True), tokens(2, 5)
    output = model(ids)
    assert output.mems is None
    # same_length with mem_len 0 has nothing to equalise: plain causal attention.
    assert torch.equal(output.logits, tiny_model(mem_len=0)(ids).logits)
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % 29
    assert not torch.equal(model(changed).logits[:, -1], output.logits[:, -1])


def test_memory_has_no_gradient_and_use_cache_false_returns_none() -> None:
    model, ids = tiny_model(), tokens(2, 5)
    output = model(ids)
    assert not any(state.requires_grad for state in output.mems)
    assert model(ids, use_cache=False).mems is None
    assert output.mems[1] is output.mems.states[1] and len(output.mems) == 2


def test_extended() -> None:
    old, new = torch.arange(2.0)[None, :, None], torch.arange(2.0, 5)[None, :, None].requires_grad_()
    assert extended(old, new, 4).flatten().tolist() == [1, 2, 3, 4]
    assert extended(old, new, 2).flatten().tolist() == [3, 4]
    assert extended(old, new, 7).flatten().tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert extended(old, new, 0).shape == (1, 0, 1)
    assert not extended(old, new, 4).requires_grad
    assert extended(torch.ones(1, 0).bool(), torch.ones(1, 2).bool(), 3).tolist() == [[False, True, True]]


def test_memory_moves_and_repeats() -> None:
    memory = TransfoXLMemory((torch.ones(2, 3, 8),), torch.ones(2, 3, dtype=torch.bool))
    half = memory.to(torch.bfloat16)
    assert half[0].dtype == torch.bfloat16 and half.valid.dtype == torch.bool
    twice = memory.repeat_interleave(2)
    assert twice[0].shape == (4, 3, 8) and twice.valid.shape == (4, 3)
    assert TransfoXLMemory((torch.ones(2, 3, 8),)).to("cpu").repeat_interleave(2).valid is None


# Padding


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind: str) -> None:
    model, ids = tiny_model(**KINDS[kind]), tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids[:, :4]], 1)
    batch = torch.cat([padded, tokens(1, 6, seed=5)])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        first = model(batch, attention_mask=mask)
        torch.testing.assert_close(first.logits[:1, 2:], model(ids[:, :4]).logits, **CLOSE)
        assert first.logits.isfinite().all()
        assert first.mems.valid.tolist() == [[False, False] + [True] * 4, [True] * 6]
        # The padding stays hidden when it is in the memory.
        second = model(torch.cat([ids[:, 4:], tokens(1, 5)]), mems=first.mems)
        alone = model(ids[:, 4:], mems=model(ids[:, :4]).mems)
        torch.testing.assert_close(second.logits[:1], alone.logits, **CLOSE)


def test_right_padding_is_never_seen() -> None:
    model, ids = tiny_model(), tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    other = ids.clone()
    other[0, 4:] = (ids[0, 4:] + 1) % 29
    with torch.no_grad():
        one, two = model(ids, attention_mask=mask), model(other, attention_mask=mask)
        assert torch.equal(one.logits[0, :4], two.logits[0, :4]) and torch.equal(one.logits[1], two.logits[1])
        following = [model(tokens(2, 3), mems=output.mems).logits for output in (one, two)]
    assert torch.equal(*following)


def test_gradients_of_padded_batches_are_finite() -> None:
    model, ids = tiny_model(**KINDS["odd_heads_before"]), tokens(2, 4)
    mask = torch.tensor([[0, 0, 0, 0], [1] * 4])
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


# Masks and positions


def visible(
    config_overrides: dict[str, Any], time: int, rows: int, valid: torch.Tensor | None = None
) -> list[list[int]]:
    """Indices of the keys that each query sees."""
    context = attention_context(tiny_config(**config_overrides), torch.zeros(1, time, 8), rows, valid)
    return [(~row).nonzero().flatten().tolist() for row in context.hidden_keys[0, 0]]


def test_who_sees_whom() -> None:
    assert visible({}, 3, 2) == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    # With full memory exactly mem_len keys.
    assert visible(dict(same_length=True, mem_len=2), 3, 2) == [[1, 2], [2, 3], [3, 4]]
    assert visible(dict(same_length=True, mem_len=3), 3, 2) == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert visible(dict(same_length=True, mem_len=0), 2, 0) == [[0], [0, 1]]
    valid = torch.tensor([[False, True, False, True]])
    assert visible({}, 2, 2, valid) == [[1, 2], [1, 3]]


def test_valid_keys() -> None:
    hidden = torch.zeros(1, 2, 8)
    assert valid_keys(hidden, 1, None, None) is None
    assert valid_keys(hidden, 1, None, torch.tensor([[0, 0, 1]])).tolist() == [[True, False, True]]
    assert valid_keys(hidden, 1, torch.tensor([[False]]), None).tolist() == [[False, True, True]]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_positions_are_float32_whatever_the_precision(dtype: torch.dtype) -> None:
    config = tiny_config(clamp_len=-1)
    expected = relative_positions(config, 1601, 0, torch.device("cpu"))
    assert expected.dtype == torch.float32 and len(expected.unique(dim=0)) == 1601
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relative_positions(config, 1601, 0, torch.device("cpu")), expected)
    context = attention_context(config, torch.zeros(1, 1, 8, dtype=dtype), 1600)
    assert torch.equal(context.positions, expected.to(dtype))


def test_clamped_distances() -> None:
    config = tiny_config(clamp_len=3)
    positions = relative_positions(config, 6, 0, torch.device("cpu"))
    assert torch.equal(positions[0], positions[2]) and not torch.equal(positions[2], positions[3])
    assert torch.equal(relative_positions(config, 6, 2, torch.device("cpu")), positions[:4])
    assert positions[-1].tolist() == [0.0] * 4 + [1.0] * 4
