"""Counts from a configuration: FLOPs by formula, kept bytes as a real forward keeps them, and what can't be counted."""

from __future__ import annotations

import pytest
import torch
from decoders import tiny
from helpers import causal_loss, make_batch, tiny_gpt2
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    T5Config,
)

from hf_ouroboros.engine.divided import DividedBackward
from hf_ouroboros.errors import UnsupportedModelError
from hf_ouroboros.models.transfo_xl import TransfoXLConfig
from hf_ouroboros.partition.late_logits import LARGE_VOCABULARY
from hf_ouroboros.planning import tracing
from hf_ouroboros.planning.unit_facts import model_facts

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
def test_any_decoder(tied: bool) -> None:
    config = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)
    facts = model_facts(config, 2, 16)
    assert facts.untrainable is None
    assert facts.tied is tied
    assert facts.units[0].modules[0] == "model.embed_tokens"
    assert facts.units[1].modules == ("model.layers.0",)
    assert [unit.modules for unit in facts.units][-2:] == [("model.norm",), ("lm_head",)]
    products = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    assert facts.units[1].flops == 2 * products * 32 + 4 * 2 * 16**2 * 32
    assert facts.units[1].plan_cost == products
    assert facts.units[-1].parameter_bytes == (0 if tied else 64 * 32 * 4)
    assert facts.active_parameters == facts.parameters


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_count_for_the_tokens_that_pass_them(model_type: str) -> None:
    """Two of four, of which the layer has twice as many parameters as it computes with; and none of them is kept."""
    few, many = (model_facts(tiny(model_type, **{name_of_experts(model_type): n}), 2, 16) for n in (4, 16))
    inner = 16 if model_type in ("qwen3_moe", "deepseek_v3") else 48
    expert, biases = 3 * 32 * inner, 32 + 2 * inner if model_type == "gpt_oss" else 0
    for facts, count in ((few, 4), (many, 16)):
        assert facts.untrainable is None
        layer = facts.units[3]
        assert layer.idle_parameters == (count - 2) * (expert + biases)
        assert facts.parameters - facts.active_parameters == sum(u.idle_parameters for u in facts.units)
        keys_and_values = 12 + 8 if model_type == "deepseek_v3" else 8 + 8  # widths of a head
        assert layer.flops == 2 * 32 * layer.plan_cost + 2 * 2 * 4 * 16**2 * keys_and_values
    # Twelve more experts make the router wider, and nothing else.
    assert many.units[3].flops - few.units[3].flops == 2 * 32 * 12 * 32
    assert many.units[3].activation_bytes - few.units[3].activation_bytes < 32 * 12 * 8 * 4
    assert many.units[3].plan_cost - few.units[3].plan_cost == 12 * 32


def name_of_experts(model_type: str) -> str:
    """The option for how many there are."""
    return {"qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts"}.get(model_type, "num_local_experts")


def test_kept_bytes_of_experts_are_those_of_a_real_forward() -> None:
    """In float32, where grouped products run on CPUs as on accelerators."""
    config = tiny("mixtral", experts_implementation="grouped_mm")
    model = AutoModelForCausalLM.from_config(config).train()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.randint(64, (4, 16))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    real = sum(storage.nbytes() for storage in kept.values())
    counted = sum(unit.activation_bytes for unit in model_facts(config, 4, 16).units)
    assert counted == pytest.approx(real, rel=0.15)


LARGE = {
    "llama": (
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
        70.6e9,
        70.6e9,
    ),
    "deepseek": (DeepseekV3Config(), 671.03e9, 37.55e9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_largest_are_counted_without_weights(name: str) -> None:
    """The published numbers of parameters, all and active; a forward takes two operations for each, but for the embedding."""
    config, parameters, active = LARGE[name]
    facts = model_facts(config, 1, 1024, torch.bfloat16)
    assert facts.untrainable is None
    assert facts.layers == config.num_hidden_layers
    assert facts.parameters == pytest.approx(parameters, rel=1e-3)
    assert facts.active_parameters == pytest.approx(active, rel=1e-3)
    embedded = config.vocab_size * config.hidden_size
    # Late logits are computed once more in the backward, which is taken for twice a forward.
    again = embedded / 3 if config.vocab_size >= LARGE_VOCABULARY else 0
    assert facts.flops / 2 / 1024 == pytest.approx(facts.active_parameters - embedded + again, rel=0.08)
    layers = [unit for unit in facts.units if unit.kind == "layer"]
    alike = {(unit.flops, unit.activation_bytes, unit.parameters) for unit in layers}
    assert len(alike) == (2 if name == "deepseek" else 1)


def test_late_logits_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(vocab_size=2**15, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    late = model_facts(config, 2, 128).units[-1]
    monkeypatch.setattr(tracing, "LARGE_VOCABULARY", 2**30)
    plain = model_facts(config, 2, 128).units[-1]
    logits = 2 * 128 * 2**15 * 4
    assert plain.activation_bytes >= logits > 100 * late.activation_bytes
    assert late.flops == plain.flops


def test_what_can_only_be_planned_says_why() -> None:
    facts = model_facts(gpt2(layerdrop=0.1), 2, 16)
    assert facts.untrainable.startswith("layerdrop=0.1: layers that are skipped at random can't be split into stages")
    assert facts.layers == 4 and facts.units[1].flops > 0


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
        (GPT2Config(n_embd=32, n_head=5), r"no gpt2 model can be made of this configuration \(ValueError: .*divisible"),
        (
            BertConfig(**SMALL, is_decoder=True, layerdrop=0.1),
            "neither in its embedding, its layers nor its head",
        ),
    ],
    ids=["memory", "no causal model", "contradiction", "can't be split, and is no plain row of layers"],
)
def test_what_cannot_be_counted(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        model_facts(config, 1, 8)


def test_what_is_left_for_later_is_that_of_a_real_backward() -> None:
    """What a divided backward keeps; of all weights but those of the embeddings."""
    model = tiny_gpt2().train()
    embedded = torch.randn(2, 7, 8).requires_grad_()
    weights = [p for name, p in model.named_parameters() if "wpe" not in name]
    divided = DividedBackward([model(inputs_embeds=embedded, labels=torch.ones(2, 7).long()).loss], [embedded], weights)
    divided.run_first(torch.autograd.backward, [None])
    kept = [tensor.untyped_storage() for junction in divided.junctions for tensor in junction.kept]
    assert sum({s.data_ptr(): s.nbytes() for s in kept}.values()) == sum(
        unit.later_bytes for unit in model_facts(model.config, 2, 7).units[1:]
    )
