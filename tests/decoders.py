"""Tiny configurations of decoders, by type: what the tests of experts, matrices and plans share."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
ROUTED = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "gemma3_text": {"intermediate_size": 48, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4},
    "mixtral": {**ROUTED, "intermediate_size": 48, "num_local_experts": 4},
    "qwen3_moe": {
        **ROUTED,
        "intermediate_size": 48,
        "head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {**ROUTED, "intermediate_size": 48, "head_dim": 8, "num_local_experts": 4, "sliding_window": 4},
    "deepseek_v3": {
        "num_experts_per_tok": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def tiny(model_type: str, **options: Any) -> PretrainedConfig:
    """A configuration of a few thousand parameters, four experts where there are some."""
    return AutoConfig.for_model(model_type, **SMALL | OWN[model_type] | options)
