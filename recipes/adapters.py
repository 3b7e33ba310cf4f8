"""LoRA adapters on the models of the recipes, and packed matrices below them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from common import OptionError
from transformers import BitsAndBytesConfig, PreTrainedModel


def packing(kind: str | None, lora_rank: int | None, bf16: bool) -> dict[str, Any]:
    """What `from_pretrained` is told about packed matrices; nothing where there are none.

    Raises:
        OptionError: no such kind, nothing that could be trained, or bitsandbytes is not installed.
    """
    if kind is None:
        return {}
    if kind not in ("nf4", "int8"):
        raise OptionError(f"quantization={kind!r} must be nf4 or int8")
    if lora_rank is None:
        raise OptionError(
            f"quantization={kind!r}: packed matrices can't be trained; add lora_rank, which adds adapters"
        )
    if find_spec("bitsandbytes") is None:
        raise OptionError(f"quantization={kind!r} needs bitsandbytes: pip install -e '.[bnb]'")
    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    dtype = torch.bfloat16 if bf16 else torch.float32
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **options)}


def with_lora(model: PreTrainedModel, rank: int) -> Any:
    """The model with LoRA adapters of a rank, twice which is their scale, on all linear modules of its layers.

    Raises:
        OptionError: no such rank, or PEFT is not installed.
    """
    if rank < 1:
        raise OptionError(f"lora_rank={rank} must be at least 1; leave it out to train the whole model")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise OptionError(f"lora_rank={rank} needs PEFT: pip install -e '.[peft]'") from None
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, adapter)
