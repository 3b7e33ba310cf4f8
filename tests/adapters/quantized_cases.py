"""Tiny models whose matrices bitsandbytes has packed, with adapters on top; always the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import adapted, saved
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytest.importorskip("bitsandbytes", reason="needs the extra `bnb`: pip install -e '.[bnb]'")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "double": {**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
    "fp4": {"load_in_4bit": True},
}
OPTIONS = {"lora on gpt2": {"fan_in_fan_out": False}}
"""Transformers turns GPT-2's matrices round when it packs them."""


def quantization(kind: str, **options: Any) -> BitsAndBytesConfig:
    """How matrices are packed."""
    return BitsAndBytesConfig(**KINDS[kind], **options)


def packed(case: str, kind: str, folder: Path, **options: Any) -> Any:
    """The quantized model without adapters, as a script loads it."""
    model = AutoModelForCausalLM.from_pretrained(saved(case, folder), quantization_config=quantization(kind, **options))
    for (
        module
    ) in model.modules():  # as our trainer does: stock Trainer, too, can't train what was evaluated on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def wrapped(case: str, kind: str, folder: Path, **options: Any) -> Any:
    """A quantized model with adapters."""
    return adapted(packed(case, kind, folder), case, **OPTIONS.get(case, {}), **options)
