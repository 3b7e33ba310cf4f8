"""Small models of any architecture: its sizes, under the names that its configuration has for them."""

from __future__ import annotations

import math
from typing import Any

from common import OptionError
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

import hf_ouroboros.models.transfo_xl  # noqa: F401 - the Auto classes then know it
from hf_ouroboros.partition.experts import CHOSEN, COUNTS

AS_WIDE = ("word_embed_proj_dim", "embedding_size", "lru_width", "attention_hidden_size")
PROPORTIONAL = (
    *("intermediate_size", "ffn_dim", "dff", "n_inner", "ffn_hidden_size", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input"),
)
HEADS = {"head_dim": 1.0, "rotary_dim": 1.0, "qk_nope_head_dim": 1.0, "v_head_dim": 1.0, "qk_rope_head_dim": 0.5}
"""Widths of parts of a head, in widths of a head."""
EXPERTS, PER_TOKEN = 8, 2
"""At most so many in a small mixture."""


def default_config(option: str, model_type: str) -> PretrainedConfig:
    """The default configuration of a type of causal language model.

    Raises:
        OptionError: there is no such type, or it is one of images or sounds that has a text model inside.
    """
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise OptionError(f"{option}={model_type!r} is unknown to Transformers; use gpt2, llama, qwen3, ...") from error
    text = config.get_text_config()
    if text is not config:
        raise OptionError(f"{option}={model_type!r} has a text model inside; use {option}={text.model_type}")
    return config


def sizes(default: PretrainedConfig, width: int, heads: int, layers: int) -> dict[str, Any]:
    """Options of a configuration that make a model of a width and a number of layers, in the type's own proportions.

    Args:
        default: the default configuration of the type.
        width: of the hidden state.
        heads: of the attention; a divisor of the width.
        layers: how many.

    Raises:
        OptionError: the type has other names for them than are known here.
    """
    known = default.to_dict()
    found: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        name = default.attribute_map.get(name, name)
        if name in known:
            found[name] = value

    put("hidden_size", width)
    put("num_hidden_layers", layers)
    if len(found) < 2:
        raise OptionError(
            f"model_type {default.model_type!r} does not call its sizes hidden_size and num_hidden_layers; give all of them in "
            "config_overrides"
        )
    share = width / default.hidden_size
    put("num_attention_heads", heads)
    groups = getattr(default, "num_key_value_heads", None)
    if groups:
        put("num_key_value_heads", math.gcd(heads, max(1, heads * groups // default.num_attention_heads)))
    for name in AS_WIDE:
        put(name, width)
    for name in PROPORTIONAL:
        if isinstance(value := known.get(name), int) and value:
            put(name, max(4, round(value * share / 4) * 4))
    latent = "qk_rope_head_dim" in known  # head_dim is another name for it then
    for name, part in HEADS.items():
        if known.get(name) is not None and not (latent and name == "head_dim"):
            put(name, max(2, round(width // heads * part / 2) * 2))
    for name in COUNTS:
        if isinstance(value := known.get(name), int) and value:
            put(name, min(value, EXPERTS))
    for name in CHOSEN:
        if isinstance(value := known.get(name), int) and value:
            put(name, min(value, PER_TOKEN))
    for name in ("n_group", "topk_group", "first_k_dense_replace"):
        if known.get(name):
            put(name, 1)
    return found


def small_model(default: PretrainedConfig, width: int, heads: int, layers: int, deviation: float) -> dict[str, Any]:
    """Options of a small model of the type, without dropout: `sizes`, and weights of this standard deviation at the start."""
    return sizes(default, width, heads, layers) | without_dropout(default) | initialized(default, deviation)


def without_dropout(default: PretrainedConfig) -> dict[str, float]:
    """Options that switch off dropout, and the dropping of layers."""
    return {n: 0.0 for n, v in default.to_dict().items() if isinstance(v, float) and "drop" in n}


def initialized(default: PretrainedConfig, deviation: float) -> dict[str, float]:
    """The option for the standard deviation of the weights at the start, where there is one."""
    return {n: deviation for n in ("initializer_range", "init_std") if n in default.to_dict()}


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model takes at most; None where nothing says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def make(default: PretrainedConfig, values: dict[str, Any]) -> PretrainedConfig:
    """A configuration of the type of another one, with other values.

    Raises:
        OptionError: the type refuses them.
    """
    try:
        return AutoConfig.for_model(default.model_type, **values)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise OptionError(
            f"a {default.model_type} configuration does not take {values}: {str(error).strip().splitlines()[-1]}; "
            "change them in config_overrides"
        ) from error
