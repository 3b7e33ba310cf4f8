"""A small configuration of every causal language model type of the installed Transformers.

The default configuration of a type is shrunk by what its fields are called; some types need a word more.
"""

from __future__ import annotations

import copy
import fnmatch
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

LAYERS = 6
TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Those that read text; the others of the mapping read sound.
ENCODER_DECODERS = tuple(
    "bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus "
    "pegasus_x plbart prophetnet switch_transformers t5 t5gemma t5gemma2 umt5".split()
)
ENCODER_DECODERS = tuple(name for name in ENCODER_DECODERS if name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)

SIZES: dict[int, str] = {
    64: "hidden_size d_model n_embd dim word_embed_proj_dim attention_hidden_size intermediate_size *ffn_dim "
    "ffn_hidden_size n_inner inner_dim *intermediate_size expert_ffn_hidden_size d_inner d_ff dff lru_width "
    "feed_forward_size dim_ff intermediate_size_mlp embedding_size input_embedding_size max_position_embeddings "
    "n_positions n_ctx max_seq_len model_max_length max_sequence_length hidden_size_global emb_dim "
    "encoder_hidden_size out_hidden_size embed_dim",
    4: "num_attention_heads n_head n_heads num_heads *coder_attention_heads *_num_attention_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts zero_expert_num linear_num_value_heads",
    2: "num_key_value_heads n_kv_heads *_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k "
    "top_k_experts moe_top_k linear_num_key_heads linear_num_heads index_n_heads index_num_heads encoder_layers "
    "num_encoder_layers expert_layer_period num_kv_shared_layers",
    16: "head_dim attention_head_dim kv_channels *_head_dim dim_head d_head mamba_d_head mamba_headdim mamba_head_dim "
    "d_kv *lora_rank time_step_rank mamba_dt_rank d_rel state_size mamba_d_state d_state ssm_state_size "
    "hidden_size_per_layer_input",
    8: "rotary_dim pe_dim sliding_window sliding_window_size local_attention attention_chunk_size "
    "window_size attention_window_size mamba_n_heads mamba_num_heads n_mamba_heads chunk_size mamba_chunk_size "
    "block_size index_topk patch_size",
    32: "original_max_position_embeddings image_size",
    128: "vocab_size vocab_size_per_layer_input unpadded_vocab_size num_embeddings",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups n_shared_experts num_shared_experts "
    "moe_num_shared_experts attn_layer_offset expert_layer_offset first_k_dense_replace num_dense_layers pretraining_tp",
    3: "attn_layer_period",
    0: "num_nextn_predict_layers num_mtp_modules",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers",
}
# The first pattern that fits a field's name counts; names without wildcards come before those with.
PATTERNS = sorted(((name, size) for size, names in SIZES.items() for name in names.split()), key=lambda p: "*" in p[0])

CAUSAL_BY_OPTION = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod reformer prophetnet bart bigbird_pegasus "
    "blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper"
).split()
LATENT_ATTENTION = (
    "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa kimi_linear "
    "minicpm3 sarvam_mla youtu longcat_flash hy_v4"
).split()
SLIDING = ["sliding_attention", "full_attention"] * 3
HYBRID = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
ABSENT = object()

MORE: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in CAUSAL_BY_OPTION},
    **{name: {"num_key_value_heads": 4} for name in LATENT_ATTENTION},
    **{name: {"layer_types": ["full_attention", "sliding_attention"] * 3} for name in ("laguna", "mellum")},
    **{name: {"use_sliding_window": True, "max_window_layers": 3} for name in ("qwen2", "qwen3")},
    **{name: {"n_layers_per_attn_res_block": 2} for name in ("inkling2_text", "inkling2_loop_text")},
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "gemma3n_text": {
        "layer_types": SLIDING,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
        "intermediate_size": [64] * LAYERS,
    },
    "gemma4_text": {"layer_types": SLIDING, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"layer_types": SLIDING, "num_kv_shared_layers": 0},
    "bamba": {"attn_layer_indices": [1, 4]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 3},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "mamba2": {"head_dim": 16, "num_heads": 8},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16, "mamba_n_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {
        "layers_block_type": HYBRID,
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "layers_block_type": HYBRID,
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "mamba_headdim": 16,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "rwkv": {"rescale_every": 0},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "musicgen_decoder": {"num_codebooks": 1, "audio_channels": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 50,
        "ple_layer_ids": [2, 6],
        "hc_lowrank": 16,
        "split_ngram_parts": 1,
        "heads_per_ngram": 2,
        "eos_token_id": 2,
    },
}
MORE["reformer"] |= {
    "axial_pos_embds_dim": (32, 32),
    "axial_pos_shape": (4, 4),
    "attn_layers": ["local", "lsh"] * 3,
    "lsh_attn_chunk_length": 8,
    "local_attn_chunk_length": 8,
    "num_buckets": 4,
}
MORE["xmod"]["default_language"] = "en_XX"
MORE["roc_bert"] |= {
    "shape_vocab_size": 128,
    "pronunciation_vocab_size": 128,
    "shape_embed_dim": 32,
    "pronunciation_embed_dim": 32,
}
MORE["deepseek_v2"] |= {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
MORE["longcat_flash"] |= {
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "num_layers": LAYERS,
    "num_hidden_layers": ABSENT,
}
MORE["glm_moe_dsa"]["indexer_types"] = ["full", "shared", "full", "shared", "shared", "full"]
MORE["dots3_note_text"] |= {
    "per_layer_config": ABSENT,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}


def tiny_config(model_type: str, **options: Any) -> PreTrainedConfig:
    """A configuration with six layers of width 64 and 128 tokens."""
    kind = CONFIG_MAPPING[model_type]
    try:
        default = kind()
    except Exception:  # some defaults contradict each other
        default = kind(**MORE.get(model_type, {}))
    return _shrunk(default, options)


def tiny_decoder(model_type: str, **options: Any) -> PreTrainedModel:
    """A model of such a configuration, always with the same weights, none of which are zeros."""
    return _made(AutoModelForCausalLM, model_type, options)


def tiny_encoder_decoder(model_type: str, **options: Any) -> PreTrainedModel:
    """A model with an encoder of two layers and a decoder of six."""
    start = {"decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
    return _made(AutoModelForSeq2SeqLM, model_type, {**start, **options})


def _made(kind: Any, model_type: str, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    attention = options.pop("attn_implementation", None)
    config = tiny_config(model_type, **options)
    model = kind.from_config(config, **({"attn_implementation": attention} if attention else {}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0, 0.02)
    return model


def _shrunk(config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedConfig:
    given = {**_small_fields(config), **MORE.get(config.model_type, {}), **options}
    if getattr(config, "rope_parameters", None) and "rope_parameters" not in given:
        given["rope_parameters"] = _small_rope(copy.deepcopy(config.rope_parameters))
    return type(config)(**{name: value for name, value in given.items() if value is not ABSENT})


def _small_fields(config: PreTrainedConfig) -> dict[str, Any]:
    layers = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None)
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("transformers_version", "architectures", "id2label", "label2id", "dtype"):
            continue
        if isinstance(value, PreTrainedConfig):
            small[name] = _shrunk(value, {})
        elif name.endswith(("token_id", "token_index", "token_idx")):
            if isinstance(value, int) and value >= 100:
                small[name] = 101 + len(small) % 20
            elif isinstance(value, list) and any(isinstance(v, int) and v >= 100 for v in value):
                small[name] = [2]
        elif value is None or isinstance(value, (bool, str)):
            continue
        elif isinstance(value, (int, float)) and any(
            word in name for word in ("dropout", "pdrop", "layerdrop", "jitter")
        ):
            small[name] = type(value)(0)
        elif isinstance(value, (list, tuple)) and layers and layers >= 2 and len(value) == layers:
            small[name] = _of_every_kind(list(value))
        elif isinstance(value, int):
            size = next((size for pattern, size in PATTERNS if fnmatch.fnmatchcase(name, pattern)), None)
            if size is not None:
                small[name] = size
    return small


def _of_every_kind(values: list[Any]) -> list[Any]:
    """As many values as there are layers, of all kinds, in an order like the original one."""
    kinds = list({str(value): value for value in values}.values())
    head = values[:LAYERS]
    if len({str(value) for value in head}) == len(kinds) or len(kinds) > LAYERS:
        return head
    return (kinds * LAYERS)[:LAYERS]


def _small_rope(parameters: Any) -> Any:
    for name, value in parameters.items():
        if isinstance(value, dict):
            _small_rope(value)
        elif name == "original_max_position_embeddings":
            parameters[name] = 32
        elif name in ("short_factor", "long_factor"):
            parameters[name] = [1.0 + 0.1 * i for i in range(8)]
        elif name == "mrope_section":
            parameters[name] = [4, 2, 2]
    return parameters
