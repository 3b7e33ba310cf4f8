"""Which matrices have an optimizer of their own: by their role in a layer, whatever the architecture calls them."""

from __future__ import annotations

import helpers
import pytest
import torch
from decoders import tiny
from helpers import VOCABULARY, Case, Run, assert_same_run
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from hf_ouroboros.optim.matrices import algorithm_of, hidden_matrices, layer_matrices
from hf_ouroboros.optim.muon import Muon, MuonAdamW
from hf_ouroboros.partition import split_model

GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = tuple(f"self_attn.{p}_proj" for p in "qkvo")
LATENT = tuple(f"self_attn.{p}" for p in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
SHARED = tuple(f"mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down"))
EXPECTED = {
    "gpt2": [("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")] * 3,
    "llama": [ATTENTION + GATED] * 3,
    "gemma3_text": [ATTENTION + GATED] * 3,
    "mixtral": [ATTENTION] * 3,
    "qwen3_moe": [ATTENTION, ATTENTION + GATED, ATTENTION],
    "gpt_oss": [ATTENTION] * 3,
    "deepseek_v3": [LATENT + GATED, LATENT + SHARED, LATENT + SHARED],
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_by_role(model_type: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny(model_type))
    stages = split_model(model, ["cpu:0", "cpu:1"], num_stages=3, check=False).stages
    names = {id(p): n for n, p in model.named_parameters()}
    chosen = hidden_matrices(stages, names.values())
    stack = "transformer.h" if model_type == "gpt2" else "model.layers"
    expected = {f"{stack}.{i}.{part}.weight" for i, parts in enumerate(EXPECTED[model_type]) for part in parts}
    assert {names[id(p)] for p in chosen} == expected
    # What is left is AdamW's; both step.
    kind, options = Muon().optimizer(TrainingArguments(report_to="none"), chosen)
    optimizer = kind([{"params": list(model.parameters())}], **options)
    assert {algorithm_of(g): len(g["params"]) for g in optimizer.param_groups} == {
        "muon": len(expected),
        "adamw": len(names) - len(expected),
    }
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]


def test_what_is_no_matrix_of_a_layer() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 16)
            self.norm = nn.LayerNorm(8)
            self.relative = nn.Embedding(32, 8)  # looked up
            self.table = nn.Parameter(torch.zeros(4, 8))  # added
            self.gate = nn.Linear(8, 1)  # a vector
            self.stream_router = nn.Linear(8, 4)  # a choice between streams

    assert list(layer_matrices(Layer())) == ["up.weight"]
    shared = nn.Linear(4, 4)
    assert list(layer_matrices(shared)) == ["weight"]


class Mixture(Case):
    """A run of a Mixtral."""

    def model(self) -> PreTrainedModel:
        """The model before it is split."""
        torch.manual_seed(0)
        config = tiny("mixtral", vocab_size=VOCABULARY, num_hidden_layers=4, experts_implementation="eager")
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.slow
def test_a_mixture_under_delay_is_stepped_as_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def muon(name: str, model: PreTrainedModel) -> torch.optim.Optimizer:
        matrices = [p for layer in model.model.layers for p in layer_matrices(layer).values()]
        return MuonAdamW([{"params": list(model.parameters()), "weight_decay": 0.1}], matrices, lr=1e-2)

    monkeypatch.setattr(helpers, "make_optimizer", muon)
    case = Mixture(stages=3, updates=(2, 2, 1, 2), tied=False, clip=0.5, padded=True)
    assert_same_run(Run(case, "reference").train(), Run(case, "pipelined").train())
