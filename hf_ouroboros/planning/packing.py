"""Which matrices of a planned model would be packed by a quantization, and how large they are then."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..partition.packed import Size, packed_bytes

KINDS = {"nf4": (4, True), "int8": (8, False)}
"""Bits per element, and whether scales are packed themselves (bnb_4bit_use_double_quant=True)."""


def packed_sizes(model: PreTrainedModel, kind: str) -> dict[int, Size]:
    """What is packed of a model without memory, by the ids of the weights: as Transformers chooses, not the head.

    Args:
        model: a model with plain modules.
        kind: one of `KINDS`.
    """
    bits, nested = KINDS[kind]
    exceptions = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
    found = {}
    for name, module in model.named_modules():
        linear = type(module) is nn.Linear
        if (linear or isinstance(module, Conv1D)) and should_convert_module(name, exceptions):
            elements, rows = module.weight.numel(), module.weight.shape[0 if linear else 1]
            found[id(module.weight)] = Size(elements, packed_bytes(elements, rows, bits, nested))
    return found
