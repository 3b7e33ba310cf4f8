"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860) for transformers 5; importing this package registers it.

import hf_ouroboros.models.transfo_xl  # from here on the Auto classes know model_type "transfo-xl"
model = AutoModelForCausalLM.from_pretrained("path/to/a/transfo-xl/checkpoint")
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import TransfoXLCache
from .configuration_transfo_xl import TransfoXLConfig
from .modeling_transfo_xl import TransfoXLLMHeadModel, TransfoXLModel, TransfoXLPreTrainedModel
from .recurrent_memory import TransfoXLMemory

__all__ = [
    "TransfoXLCache",
    "TransfoXLConfig",
    "TransfoXLLMHeadModel",
    "TransfoXLMemory",
    "TransfoXLModel",
    "TransfoXLPreTrainedModel",
]

AutoConfig.register(TransfoXLConfig.model_type, TransfoXLConfig)
AutoModel.register(TransfoXLConfig, TransfoXLModel)
AutoModelForCausalLM.register(TransfoXLConfig, TransfoXLLMHeadModel)
