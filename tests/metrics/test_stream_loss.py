"""Loss over a stream against what one pass over the whole text, or each window by hand, gives."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ouroboros.data.prepared import TextUnits
from hf_ouroboros.metrics.stream_loss import StreamLoss, stream_loss
from hf_ouroboros.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel

TOKENS = torch.randint(13, (71,), generator=torch.Generator().manual_seed(0)).numpy()


def transfo_xl(**values: object) -> TransfoXLLMHeadModel:
    torch.manual_seed(0)
    small = {"d_model": 16, "d_embed": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "n_layer": 2, "div_val": 1}
    # Weights so large that the far past matters.
    config = TransfoXLConfig(vocab_size=13, cutoffs=[4, 8], init_std=0.3, proj_init_std=0.3, **(small | values))
    return TransfoXLLMHeadModel(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, bos_token_id=0, eos_token_id=0, **size)).eval()


def nats_after(model: torch.nn.Module, ids: torch.Tensor, scored: int) -> float:
    """What the last `scored` tokens cost, read in one go."""
    with torch.no_grad():
        log_probabilities = model(ids[None, :-1]).logits[0, -scored:].log_softmax(-1)
    return -log_probabilities.gather(1, ids[-scored:, None]).sum(dtype=torch.float64).item()


@pytest.mark.parametrize("segment_length", [1, 7, 35, 70, 100])
def test_memory_makes_segments_one_text(segment_length: int) -> None:
    model = transfo_xl(mem_len=80, same_length=False)
    found = stream_loss(model, TOKENS, segment_length)
    assert found.targets == 70
    # Sums of float32 numbers in another order: ten times the spacing of numbers of that size.
    assert found.nats == pytest.approx(nats_after(model, torch.from_numpy(TOKENS), 70), rel=1e-6)
    model.config.mem_len = 0
    forgetful = stream_loss(model, TOKENS, segment_length)
    if segment_length < 70:
        assert abs(forgetful.nats - found.nats) > 0.1  # the test can tell


def test_columns_start_without_memory_and_lose_no_target() -> None:
    model, tokens = transfo_xl(mem_len=80, same_length=False), torch.from_numpy(TOKENS)
    found = stream_loss(model, TOKENS, 8, columns=3)  # 70 targets: columns of 24, 23, 23
    parts = [(0, 24), (24, 47), (47, 70)]
    expected = sum(nats_after(model, tokens[start : end + 1], end - start) for start, end in parts)
    assert found.targets == 70 and found.nats == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("segment_length", "overlap", "columns"), [(12, 0, 1), (4, 8, 3), (5, 6, 4), (1, 11, 7)])
def test_windows_see_what_is_before_them(segment_length: int, overlap: int, columns: int) -> None:
    model, tokens = gpt2(), torch.from_numpy(TOKENS)
    found = stream_loss(model, TOKENS, segment_length, overlap, columns)
    expected = 0.0
    for start in range(0, 70, segment_length):
        end = min(start + segment_length, 70)
        expected += nats_after(model, tokens[max(0, start - overlap) : end + 1], end - start)
    assert found.targets == 70 and found.nats == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(ValueError, match="segment_length=8 and overlap=5 exceed the model's 12 positions"):
        stream_loss(gpt2(), TOKENS, 8, overlap=5)
    with pytest.raises(ValueError, match="overlap=5 is for models without memory"):
        stream_loss(transfo_xl(mem_len=4), TOKENS, 8, overlap=5)


def test_figures() -> None:
    found = StreamLoss(nats=20 * math.log(2), targets=10).metrics(TextUnits(bytes=11, characters=22, words=2))
    expected = {"loss": 2 * math.log(2), "perplexity": 4, "bits_per_byte": 2, "bits_per_character": 1}
    assert found == pytest.approx(expected | {"word_perplexity": 2.0**11})
    assert StreamLoss(nats=1e6, targets=10).metrics(TextUnits(1, 1, 0))["perplexity"] == math.inf
