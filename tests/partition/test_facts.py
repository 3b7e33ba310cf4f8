"""Counts from a configuration: FLOPs by formula, kept bytes as a real forward keeps them, and what can't be counted."""

from __future__ import annotations

import pytest
import torch
from helpers import causal_loss, make_batch, tiny_gpt2
from transformers import (
    BertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    T5Config,
)

from hf_ouroboros.errors import UnsupportedModelError
from hf_ouroboros.models.transfo_xl import TransfoXLConfig
from hf_ouroboros.partition.facts import model_facts

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}


def gpt2(**options: object) -> GPT2Config:
    """A small GPT-2 without dropout."""
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2Config(n_layer=4, n_embd=32, n_head=4, n_positions=64, vocab_size=64, **none | options)


def test_gpt2_by_formula() -> None:
    batch, time, width, vocabulary = 2, 16, 32, 64
    facts = model_facts(gpt2(), batch, time)
    tokens = batch * time
    assert [unit.kind for unit in facts.units] == ["embedding", *["layer"] * 4, "head", "head"]
    layer = 2 * 12 * width**2 * tokens + 4 * batch * time**2 * width  # weights, then scores and their sums
    assert [unit.flops for unit in facts.units] == [0, *[layer] * 4, 0, 2 * width * vocabulary * tokens]
    assert {unit.output_bytes for unit in facts.units} == {tokens * width * 4}
    model = tiny_gpt2()
    assert facts.tied and facts.tied_bytes == vocabulary * width * 4
    assert facts.untrainable is None
    assert model_facts(model.config, 1, 4).parameters == model.num_parameters()
    assert model_facts(model.config, 1, 4).layers == 5


def test_kept_bytes_are_those_of_a_real_forward() -> None:
    model = tiny_gpt2().train()
    rows, time = 2, 7
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    batch = make_batch(0, rows=rows, time=time)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = causal_loss(model(input_ids=batch["input_ids"]).logits, batch, None)
    assert loss.requires_grad
    real = sum(storage.nbytes() for storage in kept.values())
    counted = sum(unit.activation_bytes for unit in model_facts(model.config, rows, time).units)
    # Masks, token ids and the loss's own buffers differ, which is much in so small a model.
    assert counted == pytest.approx(real, rel=0.15)


def test_half_precision_and_other_batches() -> None:
    full, half = model_facts(gpt2(), 2, 16), model_facts(gpt2(), 2, 16, torch.bfloat16)
    assert [u.parameter_bytes for u in half.units] == [u.parameter_bytes / 2 for u in full.units]
    assert half.units[1].output_bytes == full.units[1].output_bytes / 2
    one, two = model_facts(gpt2(), 1, 16), full.for_batch(1)
    assert two.batch == 1
    assert [(u.flops, u.output_bytes) for u in one.units] == [(u.flops, u.output_bytes) for u in two.units]
    assert sum(u.activation_bytes for u in one.units) == pytest.approx(
        sum(u.activation_bytes for u in two.units), rel=0.01
    )


@pytest.mark.parametrize("tied", [True, False])
def test_decoders_that_can_only_be_planned(tied: bool) -> None:
    config = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)
    facts = model_facts(config, 2, 16)
    assert "LlamaForCausalLM can't be split into stages" in facts.untrainable
    assert facts.tied is tied
    assert [unit.modules for unit in facts.units][:2] == [
        ("model.embed_tokens", "model.rotary_emb"),
        ("model.layers.0",),
    ]
    assert [unit.modules for unit in facts.units][-2:] == [("model.norm",), ("lm_head",)]
    products = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    assert facts.units[1].flops == 2 * products * 32 + 4 * 2 * 16**2 * 32
    assert facts.units[-1].parameter_bytes == (0 if tied else 64 * 32 * 4)


def test_eager_attention_keeps_its_scores() -> None:
    """What grows with the square of the time: nothing in fused attention, one score matrix per head in eager."""

    def square(**options: str) -> float:
        short, long = (model_facts(LlamaConfig(**SMALL, **options), 1, time).units[1] for time in (64, 128))
        return long.activation_bytes - 2 * short.activation_bytes

    assert square() == 0
    assert square(attn_implementation="eager") == 4 * 4 * (128**2 - 2 * 64**2)


def test_layers_that_differ_are_counted_one_by_one() -> None:
    config = gpt2()
    config.n_inner = 100
    facts = model_facts(config, 1, 8)
    assert len({unit.flops for unit in facts.units if unit.kind == "layer"}) == 1
    sliding = model_facts(Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2), 1, 8)
    assert sliding.layers == 3


def transfo_xl(**options: object) -> TransfoXLConfig:
    """A small Transformer-XL with a plain softmax."""
    sizes = {"d_model": 32, "d_embed": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "n_layer": 3, "vocab_size": 64}
    return TransfoXLConfig(**sizes | {"cutoffs": [], "div_val": 1, "tie_projs": [False], "mem_len": 0} | options)


def test_transformer_xl_without_memory() -> None:
    facts = model_facts(transfo_xl(), 2, 16)
    assert facts.untrainable is None and facts.layers == 3
    assert facts.parameters == sum(unit.parameters for unit in facts.units) > 0
    assert facts.units[1].flops > 2 * (32 * 32 * 4 + 2 * 32 * 48) * 32  # its weights, and the attention


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transfo_xl(mem_len=16), "attends to a memory of mem_len=16, which is not counted; plan it without"),
        (T5Config(), "model_type 't5' is no causal language model"),
        (MixtralConfig(**SMALL, num_key_value_heads=2), "num_local_experts=8: what a mixture of experts computes"),
        (BertConfig(**SMALL, is_decoder=True), "neither in its embedding, its layers nor its head"),
    ],
    ids=["memory", "no causal model", "experts", "no plain row of layers"],
)
def test_what_cannot_be_counted(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        model_facts(config, 1, 8)
