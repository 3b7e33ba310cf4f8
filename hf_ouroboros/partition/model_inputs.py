"""What a model is called with and what it returns, as far as it concerns stages."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from ..errors import EngineError, UnsupportedModelError
from .meta import is_encoder_decoder

NOT_OF_A_BATCH = frozenset(
    {"labels", "past_key_values", "use_cache", "return_dict", "logits_to_keep", "num_items_in_batch", "cache_position"}
)
"""Arguments of a model's forward that stages are not given from a batch, besides those that begin with `output_`."""

DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
"""What the decoder of an encoder-decoder model reads; if a batch has none of it, the model makes it of the labels."""

OF_ALL_LAYERS = {
    "output_hidden_states": "returns what every layer puts out, but layers of other stages keep it to themselves",
    "output_attentions": "returns every layer's attention, but layers of other stages keep it to themselves",
}
"""Options of a configuration that ask for something of all layers at once, and why stages can't give it."""

NOT_HERE = frozenset({"router_logits", "encoder_last_hidden_state"})
"""What a model returns of layers that are in other stages."""


def batch_keys(model: nn.Module) -> frozenset[str]:
    """What of a batch every stage of a model computes with."""
    parameters = inspect.signature(type(model).forward).parameters
    keys = frozenset(name for name in parameters if not name.startswith("output_")) - NOT_OF_A_BATCH - {"self"}
    return keys | {"labels"} if is_encoder_decoder(model) else keys  # of which it may make the decoder's inputs


def foreign_outputs(model: nn.Module) -> frozenset[str]:
    """Names of the arguments and options that ask for what layers put out."""
    parameters = inspect.signature(type(model).forward).parameters
    return frozenset(name for name in parameters if name.startswith("output_")) | OF_ALL_LAYERS.keys()


def without_unused_labels(batch: dict[str, Any], keys: frozenset[str]) -> tuple[dict[str, Any], frozenset[str]]:
    """A batch, and what of it stages compute with: not the labels, where the decoder's inputs are given."""
    if "labels" not in batch or all(batch.get(key) is None for key in DECODER_INPUTS):
        return batch, keys
    keys -= {"labels"}
    return {key: value for key, value in batch.items() if key in keys}, keys


def of_last_stage(output: Any) -> Any:
    """What a model returned, without what layers of other stages would have had to put in."""
    if not isinstance(output, ModelOutput) or not NOT_HERE & output.keys():
        return output
    return type(output)(**{name: value for name, value in output.items() if name not in NOT_HERE})


def tokens_of(batch: Mapping[str, Any]) -> torch.Tensor:
    """The tokens of a batch: [batch, time] or, embedded, [batch, time, width].

    Raises:
        EngineError: it has none.
    """
    for key in ("input_ids", "inputs_embeds"):
        if key in batch:
            return batch[key]
    raise EngineError(f"a batch needs input_ids (or inputs_embeds), but has {', '.join(batch) or 'nothing'}")


def check_config(config: PretrainedConfig) -> None:
    """Refuses options that ask for something of all layers at once.

    Raises:
        UnsupportedModelError: says which.
    """
    for name, why in OF_ALL_LAYERS.items():
        if getattr(config, name, False):
            raise UnsupportedModelError(f"config.{name}=True {why}; set it to False (the default) to train in stages")
