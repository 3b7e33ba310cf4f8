"""The configuration: published files, round trips, early errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transfo_xl_cases import KINDS, tiny_config
from transformers import AutoConfig

from hf_ouroboros.models.transfo_xl import TransfoXLConfig

# What the Hub has for the published WikiText-103 model.
PUBLISHED = {
    "adaptive": True,
    "architectures": ["TransfoXLLMHeadModel"],
    "attn_type": 0,
    "clamp_len": 1000,
    "cutoffs": [20000, 40000, 200000],
    "d_embed": 1024,
    "d_head": 64,
    "d_inner": 4096,
    "d_model": 1024,
    "div_val": 4,
    "dropatt": 0.0,
    "dropout": 0.1,
    "eos_token_id": 0,
    "ext_len": 0,
    "init": "normal",
    "init_range": 0.01,
    "init_std": 0.02,
    "layer_norm_epsilon": 1e-05,
    "mem_len": 1600,
    "model_type": "transfo-xl",
    "n_head": 16,
    "n_layer": 18,
    "pre_lnorm": False,
    "proj_init_std": 0.01,
    "same_length": True,
    "sample_softmax": -1,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 250}},
    "tgt_len": 128,
    "tie_projs": [False, True, True, True],
    "tie_weight": True,
    "untie_r": True,
    "vocab_size": 267735,
}


def test_a_published_config_is_the_default_one_with_attended_zeros(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, TransfoXLConfig)
    ours, default = config.to_dict(), TransfoXLConfig().to_dict()
    for key in ("architectures", "task_specific_params", "_name_or_path", "transformers_version"):
        ours.pop(key, None), default.pop(key, None)
    assert ours == default | {"mem_init": "zeros"}
    assert config.tie_word_embeddings is True and not hasattr(config, "ext_len")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mem_init", ("masked", "zeros"))
def test_round_trip(kind: str, mem_init: str, tmp_path: Path) -> None:
    config = tiny_config(**KINDS[kind], mem_init=mem_init)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    assert TransfoXLConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_old_switches() -> None:
    assert TransfoXLConfig(tie_weight=False).tie_word_embeddings is False
    assert TransfoXLConfig(proj_share_all_but_first=False).tie_projs == [False] * 4
    assert TransfoXLConfig(proj_share_all_but_first=False, tie_projs=[True] * 4).tie_projs == [True] * 4
    config = TransfoXLConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 18, 16)
    assert config.n_token == config.vocab_size


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(cutoffs=[8, 8]), r"cutoffs=\[8, 8\] must increase strictly between 0 and vocab_size=29"),
        (dict(cutoffs=[8, 29]), "must increase strictly"),
        (dict(cutoffs=[0, 8]), "must increase strictly"),
        (dict(cutoffs=[8], tie_projs=[False]), "one entry per cluster, 2"),
        (dict(cutoffs=[8, 20], div_val=4), "d_embed=8 must be at least div_val"),
        (dict(div_val=0), "div_val=0"),
        (dict(d_model=7), "d_model=7 must be even"),
        (dict(mem_len=-1), "mem_len=-1"),
        (dict(mem_init="empty"), "mem_init='empty' isn't one of 'masked', 'zeros'"),
        (dict(init="xavier"), "init='xavier'"),
        (dict(attn_type=1), "attn_type=1 isn't supported"),
        (dict(sample_softmax=100), "sample_softmax=100 isn't supported"),
        (dict(ext_len=4), "ext_len=4 isn't supported"),
        (dict(adaptive=False, cutoffs=[8]), "adaptive=False contradicts"),
    ],
)
def test_impossible_values_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)
