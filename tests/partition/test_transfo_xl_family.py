"""Stages of a Transformer-XL compute what the model computes: log-probabilities, loss, memories; and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, cpu_devices, tiny_gpt2
from stream_helpers import CUT, CUT_ONE_TABLE, TIME, tiny_xl
from transformers import AutoModelForCausalLM

from hf_ouroboros.errors import UnsupportedModelError, UnsupportedOptionError
from hf_ouroboros.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel, TransfoXLMemory
from hf_ouroboros.partition import Partition, compose, split_model
from hf_ouroboros.partition.device_map import plan_stages
from hf_ouroboros.partition.families.transfo_xl import TransfoXLFamily, TransfoXLStage

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "div_val 4": CUT,
    "div_val 1": CUT_ONE_TABLE,
    "zeros": {**CUT, "mem_init": "zeros"},
    "evaluation": {"same_length": True, "clamp_len": 3},
    "short memory": {"mem_len": 3, "pre_lnorm": True},
    "no memory": {"mem_len": 0},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def split(model: TransfoXLLMHeadModel, stages: int, **kwargs: Any) -> Partition:
    tied = bool(model.all_tied_weights_keys)
    return split_model(model, cpu_devices(max(1, stages - tied)), num_stages=stages, **kwargs)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


# ---- equal to the model ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@torch.no_grad()
def test_segments_of_a_stream(kind: str, stages: int) -> None:
    """Log-probabilities and memories of three segments, the second with padding."""
    model = tiny_xl(**KINDS[kind]).eval()
    partition = split(model, stages)
    memories: list[dict[str, torch.Tensor]] = [{} for _ in range(stages)]
    mems = None
    for segment in range(3):
        batch = {"input_ids": ids(2, TIME, seed=segment)}
        if segment == 1:
            batch["attention_mask"] = torch.tensor([[1] * TIME, [0, 0, *[1] * (TIME - 2)]])
        expected = model(**batch, mems=mems)
        assert torch.equal(compose(partition.stages, batch, memories), expected.logits)
        mems = expected.mems
        if mems is None:
            assert model.config.mem_len == 0
            continue
        found = {name: tensor for memory in memories for name, tensor in memory.items()}
        for i, state in enumerate(mems):
            assert torch.equal(found[f"transformer.layers.{i}"], state)
        assert ("valid" in found) == (mems.valid is not None)
        for memory in memories:
            assert not memory or mems.valid is None or torch.equal(memory["valid"], mems.valid)
            assert not any(tensor.requires_grad for tensor in memory.values())


@pytest.mark.parametrize("kind", ["plain", "div_val 4", "div_val 1"])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_heads_own_loss(kind: str, shifted: bool) -> None:
    """Loss and gradients are those of the model, bit for bit; nothing over the whole vocabulary is built."""
    model = tiny_xl(**KINDS[kind]).train()
    partition = split(model, 3)
    labels = ids(2, TIME, seed=3)
    labels[0, 2] = -100
    targets = {"shift_labels" if shifted else "labels": labels, "num_items_in_batch": 7}
    batch = {"input_ids": ids(2, TIME)}
    expected = model(**batch, **targets)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = compose(partition.stages, batch, finish=lambda model: model(**batch, **targets).loss)
    found.backward()
    assert torch.equal(found, expected.loss)
    assert all(torch.equal(gradients[name], p.grad) for name, p in model.named_parameters())


def test_without_memory_the_forward_leaves_nothing() -> None:
    partition = split(tiny_xl(mem_len=0), 2)
    assert not partition.remembers
    assert split(tiny_xl(), 2).remembers


# ---- ownership ----


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, ["emb_layers.0.weight"]),
        ({"tie_word_embeddings": False}, []),
        (CUT, ["emb_layers.0.weight", "emb_layers.1.weight", "emb_layers.2.weight", "emb_projs.1", "emb_projs.2"]),
        ({**CUT, "tie_word_embeddings": False}, ["emb_projs.1", "emb_projs.2"]),
        ({**CUT, "tie_projs": [True, False, False]}, [*(f"emb_layers.{i}.weight" for i in range(3)), "emb_projs.0"]),
        (CUT_ONE_TABLE, ["emb_layers.0.weight", "emb_projs.0"]),
    ],
)
def test_every_tied_matrix_belongs_to_the_first_stage(config: dict[str, Any], tied: list[str]) -> None:
    model = tiny_xl(**config)
    partition = split(model, 3)
    assert partition.tied_names == tuple(f"transformer.word_emb.{name}" for name in tied)
    assert partition.plan.tied == bool(tied)
    assert (partition.plan.placement[0] == partition.plan.placement[-1]) == bool(tied)
    owned = [name for k in range(3) for name in partition.owned(k)]
    assert sorted(owned) == sorted(dict(model.named_parameters()))
    assert set(partition.tied_names) <= partition.owned(0).keys()
    assert sum(row.parameters for row in partition.plan.rows) == model.num_parameters()


def test_cost_of_the_adaptive_softmax() -> None:
    """The WikiText-103 model: its table has most of the parameters, but most of its rows are rarely multiplied."""
    shape: dict[str, Any] = dict(d_model=410, d_embed=410, n_head=10, d_head=41, d_inner=2100, n_layer=16, div_val=1)
    with torch.device("meta"):
        model = TransfoXLLMHeadModel(TransfoXLConfig(**shape))
        plain = TransfoXLLMHeadModel(TransfoXLConfig(cutoffs=[], **shape))
    family = TransfoXLFamily()
    adaptive, whole = (family.units(m)[-1].cost for m in (model, plain))
    assert whole == 267735 * 410
    assert 20000 * 410 < adaptive < whole / 5  # more than the shortlist
    rows = 20003 + 20000 * math.log(2) / math.log(267735)  # shortlist, clusters, and the other words by their frequency
    rows += 160000 * math.log(5) / math.log(267735) + 67735 * math.log(267735 / 200000) / math.log(267735)
    assert math.isclose(adaptive, rows * 410)
    units = family.units(model)
    first, _, last = plan_stages("auto", units, cpu_devices(2), tied=True, num_stages=3)
    others = [unit.kind for span in (first, last) for unit in units[span.start : span.stop]]
    assert others.count("layer") >= 2  # the device with the softmax has time for layers, too
    with torch.device("meta"):
        divided = TransfoXLLMHeadModel(TransfoXLConfig(**{**shape, "div_val": 4, "d_embed": 512}))
    assert family.units(divided)[-1].cost < adaptive * 1.3


# ---- relative biases that all layers share ----


def test_untied_biases_are_the_same_function() -> None:
    model = tiny_xl(untie_r=False, **CUT).eval()
    with torch.no_grad():
        batch = ids(2, TIME)
        first = model(batch)
        expected = model(batch, mems=first.mems).logits
        with pytest.raises(
            UnsupportedModelError, match=r"untie_r=False.*model\.untie_r_biases\(\).*16 more parameters per"
        ):
            split(model, 2)
        before = model.num_parameters()
        model.untie_r_biases()
        assert model.num_parameters() == before + 16 * (len(model.transformer.layers) - 1)
        assert torch.equal(model(batch, mems=first.mems).logits, expected)
        partition = split(model, 3)
        memories: list[dict[str, torch.Tensor]] = [{}, {}, {}]
        compose(partition.stages, {"input_ids": batch}, memories)
        assert torch.equal(compose(partition.stages, {"input_ids": batch}, memories), expected)
    biases = [layer.dec_attn.r_w_bias for layer in model.transformer.layers]
    assert len({id(bias) for bias in biases}) == len({bias.data_ptr() for bias in biases}) == 5


def test_untied_biases_are_saved(tmp_path: Any) -> None:
    model = tiny_xl(untie_r=False).eval()
    model.untie_r_biases()
    model.untie_r_biases()  # nothing is left to do
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.untie_r
    with torch.no_grad():
        assert torch.equal(again(ids(2, 4)).logits, model(ids(2, 4)).logits)


# ---- refusals ----


def test_gradient_checkpointing_is_refused() -> None:
    model = tiny_xl()
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match=r"gradient_checkpointing_disable\(\).*recompute=True"):
        split(model, 2)


def test_stages_that_forget_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_a_layer(self: Any, hidden: torch.Tensor, batch: Any, memory: Any) -> torch.Tensor:
        self.layer_names = self.layer_names[1:]
        return run_layers(self, hidden, batch, memory) if self.layer_names else hidden

    run_layers = TransfoXLStage._run_layers
    monkeypatch.setattr(TransfoXLStage, "_run_layers", forgets_a_layer)
    with pytest.raises(UnsupportedModelError, match="TransfoXLLMHeadModel don't compute what the model computes"):
        split(tiny_xl(**CUT), 2)


def test_evaluation_config() -> None:
    partition = split(tiny_xl(), 2)
    config = partition.evaluation_config(mem_len=20, clamp_len=9)
    assert (config.mem_len, config.clamp_len, config.n_layer) == (20, 9, 5)
    assert (partition.model.config.mem_len, partition.model.config.clamp_len) == (7, -1)
    assert partition.evaluation_config() is partition.model.config


def test_evaluation_config_of_a_model_without_memory() -> None:
    partition = split_model(tiny_gpt2(), cpu_devices(1))
    with pytest.raises(UnsupportedOptionError, match="eval_mem_len=20: a gpt2 model has no memory"):
        partition.evaluation_config(mem_len=20)
    assert not partition.remembers


def test_the_models_memory_is_accepted_where_it_came_from() -> None:
    """The stages' memories put together are what the unsplit model takes as `mems`."""
    model = tiny_xl(**CUT).eval()
    partition = split(model, 3)
    memories: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    with torch.no_grad():
        compose(partition.stages, {"input_ids": ids(2, TIME)}, memories)
        states = {name: tensor for memory in memories for name, tensor in memory.items()}
        mems = TransfoXLMemory(tuple(states[f"transformer.layers.{i}"] for i in range(5)), states["valid"])
        expected = model(ids(2, 3), mems=mems).logits
        assert torch.equal(compose(partition.stages, {"input_ids": ids(2, 3)}, memories), expected)
