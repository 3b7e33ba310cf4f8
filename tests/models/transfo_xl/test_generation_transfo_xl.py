"""Generation: the cache gives what recomputing gives, for every way of decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transfo_xl_cases import KINDS, tiny_model, tokens
from transformers import set_seed

from hf_ouroboros.models.transfo_xl import TransfoXLCache, TransfoXLLMHeadModel
from hf_ouroboros.models.transfo_xl import cache as cache_module
from hf_ouroboros.models.transfo_xl.cache import CACHE_NAME, MemoryCacheLayer

# Float32 rounding of the same sums in other orders.
CLOSE = dict(atol=1e-5, rtol=1e-5)
NEW = dict(max_new_tokens=10, eos_token_id=None, pad_token_id=0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough that buffers move and positions grow within a test."""
    monkeypatch.setattr(cache_module, "BLOCK", 3)


@torch.no_grad()
def with_mems(model: TransfoXLLMHeadModel, ids: torch.Tensor, mems: Any = None) -> list[torch.Tensor]:
    """Log-probabilities of the last position, token by token, with the memory of training."""
    output = model(ids[:, :4], mems=mems)
    logits = [output.logits[:, -1]]
    for t in range(4, ids.shape[1]):
        output = model(ids[:, t : t + 1], mems=output.mems)
        logits.append(output.logits[:, -1])
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mem_init", ("masked", "zeros"))
@pytest.mark.parametrize("given", (False, True))
@torch.no_grad()
def test_the_cache_is_the_memory(kind: str, mem_init: str, given: bool) -> None:
    """Far beyond mem_len, with one token and with several at a time."""
    model, ids = tiny_model(**KINDS[kind], mem_init=mem_init), tokens(2, 20)
    mems = model(tokens(2, 3, seed=9)).mems if given else None
    expected = with_mems(model, ids, mems)
    output = model(ids[:, :4], mems=mems, use_cache=True)
    torch.testing.assert_close(output.logits[:, -1], expected[0], **CLOSE)
    assert output.mems is None
    for t in range(4, 20):
        output = model(ids[:, t : t + 1], cache=output.cache, use_cache=True)
        torch.testing.assert_close(output.logits[:, -1], expected[t - 3], **CLOSE)
    assert output.cache.get_seq_length() == 20 and output.cache.rows == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "decoding",
    (dict(do_sample=False), dict(do_sample=True, top_k=5), dict(num_beams=3), dict(num_beams=2, do_sample=True)),
)
def test_generate_with_and_without_cache(kind: str, decoding: dict[str, Any]) -> None:
    # Without cache the whole text is one segment: the same with memory for all of it.
    model, ids = tiny_model(**{**KINDS[kind], "mem_len": 16}), tokens(2, 5)
    results = []
    for use_cache in (True, False):
        set_seed(0)
        results.append(model.generate(ids, use_cache=use_cache, **NEW, **decoding))
    assert torch.equal(*results) and results[0].shape == (2, 15)


def test_memory_of_a_text_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before, ids = tiny_model(mem_len=40), tokens(2, 7, seed=4), tokens(2, 5)
    mems = model(before).mems
    for decoding in (dict(do_sample=False), dict(num_beams=3)):
        continued = model.generate(ids, mems=mems, **NEW, **decoding)
        assert torch.equal(continued, model.generate(ids, mems=mems, use_cache=False, **NEW, **decoding))
    whole = model.generate(torch.cat([before, ids], 1), do_sample=False, **NEW)
    assert torch.equal(whole[:, 7:], model.generate(ids, mems=mems, do_sample=False, **NEW))


def test_a_cache_can_be_continued() -> None:
    model, ids = tiny_model(mem_len=40), tokens(2, 5)
    whole = model.generate(ids, do_sample=False, **NEW)
    first = model.generate(ids, do_sample=False, return_dict_in_generate=True, **{**NEW, "max_new_tokens": 4})
    cache = getattr(first, CACHE_NAME)
    assert isinstance(cache, TransfoXLCache) and cache.get_seq_length() == 8
    rest = model.generate(first.sequences, **{CACHE_NAME: cache}, do_sample=False, **{**NEW, "max_new_tokens": 6})
    assert torch.equal(rest, whole)


@pytest.mark.parametrize("decoding", (dict(do_sample=False), dict(num_beams=3)))
def test_batches_of_left_padded_prompts(decoding: dict[str, Any]) -> None:
    model, ids = tiny_model(mem_len=6), tokens(2, 6)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :3], mask[0, :3] = 0, 0
    batch = model.generate(padded, attention_mask=mask, **NEW, **decoding)
    alone = model.generate(ids[:1, 3:], **NEW, **decoding)
    assert torch.equal(batch[0, 6:], alone[0, 3:])
    assert torch.equal(batch[1], model.generate(ids[1:], **NEW, **decoding)[0])


@pytest.mark.parametrize("decoding", (dict(do_sample=False), dict(num_beams=3)))
def test_without_memory_the_text_is_read_again(decoding: dict[str, Any]) -> None:
    model, ids = tiny_model(mem_len=0), tokens(2, 5)
    expected = tiny_model(mem_len=40).generate(ids, **NEW, **decoding)
    assert torch.equal(model.generate(ids, **NEW, **decoding), expected)


def test_scores_are_log_probabilities() -> None:
    output = tiny_model().generate(tokens(1, 3), output_logits=True, return_dict_in_generate=True, **NEW)
    torch.testing.assert_close(torch.stack(output.logits).exp().sum(-1), torch.ones(10, 1))


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_gradient_flows_through_new_tokens_of_a_cached_forward(implementation: str) -> None:
    """As through a segment with memory, whose rows have no gradient either; later tokens don't disturb it."""
    model, ids = tiny_model(), tokens(2, 5)
    model.set_attn_implementation(implementation)
    gradients = []
    for cached in (False, True):
        embeddings = model.transformer.word_emb(ids).detach().requires_grad_()
        with torch.no_grad():
            before = model(ids, use_cache=cached or None)
        carried = dict(cache=before.cache) if cached else dict(mems=before.mems)
        model.zero_grad()
        output = model(inputs_embeds=embeddings, labels=ids, **carried)
        if cached:
            with torch.no_grad():
                model(ids, cache=output.cache)
        output.loss.backward()
        gradients.append(
            (output.loss.detach(), embeddings.grad, model.transformer.layers[-1].dec_attn.r_net.weight.grad)
        )
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


# The cache by itself


def states(start: int, count: int) -> torch.Tensor:
    return torch.arange(float(start), start + count).view(1, 1, count, 1).repeat(2, 1, 1, 1)


def test_a_layer_keeps_the_last_rows() -> None:
    layer = MemoryCacheLayer(mem_len=4)
    begin = 0
    for count in (2, 1, 1, 1, 7, 1, 1, 1, 1, 1, 1):
        keys, values = layer.update(states(begin, count), -states(begin, count))
        first = max(0, begin - 4)
        assert keys[0, 0, :, 0].tolist() == list(range(first, begin + count))
        assert torch.equal(values, -keys)
        begin += count
    assert layer.get_seq_length() == layer.get_max_length() == layer.get_max_cache_shape() == 4
    assert layer.get_mask_sizes(2) == (6, 0)


def test_projected_positions_are_computed_once() -> None:
    layer, asked = MemoryCacheLayer(mem_len=4), []

    def project(far: int, near: int) -> torch.Tensor:
        asked.append((far, near))
        return torch.arange(far - 1.0, near - 1, -1).view(1, -1, 1)

    with torch.no_grad():
        for count in (2, 3, 4, 5, 5, 2, 8):
            assert layer.relative_keys(count, project).flatten().tolist() == list(range(count - 1, -1, -1))
    assert asked == [(3, 0), (6, 3), (9, 6)]


def test_selecting_samples_and_resetting() -> None:
    model = tiny_model()
    cache = TransfoXLCache(model.config)
    ids, mask = tokens(2, 5), torch.tensor([[0, 1, 1, 1, 1], [1] * 5])
    with torch.no_grad():
        fresh = model(ids, attention_mask=mask, cache=cache, use_cache=True)
        cache.reorder_cache(torch.tensor([1, 1]))
        assert cache.valid.all() and torch.equal(cache.layers[0].keys[0], cache.layers[0].keys[1])
        cache.reset()
        assert cache.get_seq_length() == cache.rows == 0
        again = model(ids, attention_mask=mask, cache=cache, use_cache=True)
    torch.testing.assert_close(again.logits, fresh.logits, **CLOSE)
