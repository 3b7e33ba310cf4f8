"""Small configurations of any architecture, in its own proportions and without dropout."""

from __future__ import annotations

import pytest
import torch
from architectures import default_config, initialized, make, positions_of, sizes, without_dropout
from common import OptionError
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("gpt2", {"n_embd": 64, "n_head": 2, "n_layer": 3}),
        ("llama", {"hidden_size": 64, "intermediate_size": 172, "num_key_value_heads": 2}),
        ("qwen3", {"head_dim": 32, "num_hidden_layers": 3}),
        ("gemma3_text", {"head_dim": 32, "num_key_value_heads": 1}),
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
        ("deepseek_v3", {"n_routed_experts": 8, "n_group": 1, "qk_rope_head_dim": 16, "first_k_dense_replace": 1}),
        ("gpt_oss", {"num_local_experts": 8, "head_dim": 32}),
        ("gpt_neox", {"hidden_size": 64}),
        ("phi3", {"hidden_size": 64}),
        ("opt", {"ffn_dim": 256, "word_embed_proj_dim": 64}),
        ("bloom", {"hidden_size": 64}),
    ],
)
def test_sizes(model_type: str, expected: dict[str, int]) -> None:
    default = default_config("--model_type", model_type)
    values = sizes(default, width=64, heads=2, layers=3) | without_dropout(default) | initialized(default, 0.06)
    config = make(default, values | {"vocab_size": 257, "pad_token_id": None})
    assert {name: getattr(config, name) for name in expected} == expected
    assert not [n for n, v in config.to_dict().items() if "drop" in n and isinstance(v, float) and v]
    assert 0.06 in (getattr(config, "initializer_range", None), getattr(config, "init_std", None))
    model = AutoModelForCausalLM.from_config(config)
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 257)
    assert model.num_parameters() < 1_500_000


def test_what_is_no_such_type_is_named() -> None:
    with pytest.raises(OptionError, match="--model_type='gpt-2' is unknown to Transformers; use gpt2"):
        default_config("--model_type", "gpt-2")
    with pytest.raises(OptionError, match="model_type='gemma3' has a text model inside; use model_type=gemma3_text"):
        default_config("model_type", "gemma3")
    default = default_config("model_type", "llama")
    with pytest.raises(OptionError, match="a llama configuration does not take .*change them in config_overrides"):
        make(default, sizes(default, width=64, heads=3, layers=2))


def test_positions() -> None:
    assert positions_of(default_config("model_type", "gpt2")) == 1024
    assert positions_of(default_config("model_type", "bloom")) is None
