"""A quantized base below adapters: what is refused, and what of it has to be settled before the first forward."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..partition.packed import packed_linears
from ..partition.packed_loading import check_method
from ..partition.packed_tensors import QUANTO, TORCHAO, is_own_kind, make_lean, objection
from .wrapping import base_of, is_adapted

# Libraries whose tensors are parameters, where a model was quantized without Transformers.
OTHERS = ("torchao", "optimum", "hqq", "gptqmodel", "awq")
ADAPT = 'adapters on top of it can be trained: get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))'


def check_quantized(model: Any, autocast: torch.dtype | None = None) -> None:
    """Refuses quantized models that can't be trained in stages, and readies those that can.

    Args:
        model: wrapped by PEFT, or any other.
        autocast: what forwards are run with; None for nothing.

    Raises:
        UnsupportedModelError: another kind than bitsandbytes' 4-bit and 8-bit and int8 weights of torchao and quanto, no
            adapters, packed for inference, or quanto's with another dtype than autocast's.
    """
    base = base_of(model)
    library = None
    if (method := getattr(base, "quantization_method", None)) is not None and getattr(base, "is_quantized", True):
        library = check_method(method)
    packed = dict(packed_linears(base))
    known = {id(module.weight) for module in packed.values()}
    for name, parameter in base.named_parameters():
        if (other := type(parameter).__module__.partition(".")[0]) in OTHERS and id(parameter) not in known:
            check_method(f"{other}'s {type(parameter).__name__}, the parameter {name}")
    _check_kinds(base)
    if not packed:
        if library in (TORCHAO, QUANTO):
            raise UnsupportedModelError(
                f"{library} has packed nothing of this {type(base).__name__}: Transformers lets it pack nn.Linear modules only; "
                "load the model with BitsAndBytesConfig(load_in_8bit=True), or without quantization_config"
            )
        return
    if not is_adapted(model):
        raise UnsupportedModelError(
            f"this {type(base).__name__} is quantized: its matrices are packed and can't be trained, only {ADAPT}"
        )
    for name, module in packed.items():
        _check_linear(name, module)
        if is_own_kind(module.weight):
            _check_dtype(name, module.weight, autocast)
            make_lean(module)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Its evaluation would repack the weights for good, and no backward could use them.
            module.support_avx512bf16_for_cpu = False


def _check_linear(name: str, module: nn.Module) -> None:
    weight: Any = module.weight
    if weight.requires_grad:
        raise UnsupportedModelError(f"{name}.weight is packed and can't be trained; freeze it, only {ADAPT}")
    if is_own_kind(weight):
        if (found := objection(weight)) is not None:
            raise UnsupportedModelError(
                f"the packed matrix {name}.weight {found}; load the model with TorchAoConfig(Int8WeightOnlyConfig()), without "
                "more options, or QuantoConfig(weights='int8')"
            )
        return
    if weight.is_meta or not hasattr(module, "quant_state"):
        return
    state = getattr(weight, "quant_state", None) or module.quant_state
    if state is None:
        raise UnsupportedModelError(
            f"{name} is a 4-bit module whose weights are not packed yet; load the model with "
            "from_pretrained(..., quantization_config=...), or move it to its device"
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedModelError(
            f"the weights of {name} were repacked for inference on this CPU, by a forward in evaluation mode before the "
            "trainer was made, and have no backward any more; load the model anew, and evaluate with trainer.evaluate()"
        )


def _check_dtype(name: str, weight: torch.Tensor, autocast: torch.dtype | None) -> None:
    if autocast is not None and hasattr(weight, "qtype") and weight.dtype != autocast:
        raise UnsupportedModelError(
            f"{name}.weight was packed by quanto out of {weight.dtype}, and has no product with what autocast computes in "
            f"{autocast} (bf16, fp16); load the model with dtype={autocast}, or leave bf16 and fp16 off"
        )


def _check_kinds(base: nn.Module) -> None:
    """Refuses modules of bitsandbytes other than linear ones with packed weights."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    layers = getattr(bitsandbytes, "nn", None)
    if layers is None:
        return
    for name, module in base.named_modules():
        if isinstance(module, layers.Linear8bitLt) and module.state.has_fp16_weights:
            raise UnsupportedModelError(
                f"{name} has llm_int8_has_fp16_weight=True: its weights are trained and packed anew in every forward, which "
                "older versions of them in flight don't allow; leave it False and train adapters"
            )
        if isinstance(module, (layers.Embedding4bit, layers.Embedding8bit)):
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}: stages were compared with packed linear modules only; keep the "
                "embedding as it is"
            )
