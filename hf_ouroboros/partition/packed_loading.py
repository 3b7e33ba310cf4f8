"""Packing while loading, in parts: Transformers packs a process's own matrices one by one and leaves the others alone.

What is foreign is a plain linear module on the meta device until everything is read, and is exchanged then, so that modules,
shapes and dtypes are the same in all processes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

from ..errors import UnsupportedModelError
from .packed import forget_foreign

BITSANDBYTES = "bitsandbytes"


class Packing:
    """How linear modules of a model are packed.

    Args:
        config: a `BitsAndBytesConfig`, or one as a dict.

    Raises:
        UnsupportedModelError: another kind of quantization, or bitsandbytes is not installed.
    """

    def __init__(self, config: Any):
        self.config = AutoQuantizationConfig.from_dict(dict(config)) if isinstance(config, dict) else config
        check_method(getattr(self.config, "quant_method", type(config).__name__))
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise UnsupportedModelError(
                "a BitsAndBytesConfig needs bitsandbytes: pip install 'hf_ouroboros[bnb]'"
            ) from None

    def exceptions(self, model: PreTrainedModel) -> list[str]:
        """Patterns of the modules that stay as they are: head, tied modules, and those that the configuration names."""
        given, kept = self.config.llm_int8_skip_modules, model._keep_in_fp32_modules
        return sorted(HfQuantizer.get_modules_to_not_convert(model, given, None if kept is None else list(kept)))

    def of_own(self, model: PreTrainedModel, foreign: Sequence[str]) -> Any:
        """The configuration for loading a part.

        Args:
            model: a skeleton, with plain modules.
            foreign: names of the parameters that are not loaded.
        """
        modules = {name.rpartition(".")[0] for name in foreign}
        linear = [name for name in sorted(modules) if isinstance(model.get_submodule(name), (nn.Linear, Conv1D))]
        own = copy.copy(self.config)
        own.llm_int8_skip_modules = [*self.exceptions(model), *map(re.escape, linear)]
        return own

    def of_meta(self, model: PreTrainedModel, exceptions: Sequence[str]) -> None:
        """Exchanges the plain linear modules of a model, which are on the meta device, for packed ones without values."""
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(model.dtype)
            replace_with_bnb_linear(model, list(exceptions), self.config)
        finally:
            torch.set_default_dtype(before)
        forget_foreign(model)

    def complete(self, model: PreTrainedModel, exceptions: Sequence[str]) -> None:
        """Makes a loaded part what it would be beside the others."""
        self.of_meta(model, exceptions)
        quantizer: Any = model.hf_quantizer
        model.config.quantization_config = quantizer.quantization_config = self.config


def check_method(method: Any) -> None:
    """Refuses kinds of quantization that stages were not compared with.

    Raises:
        UnsupportedModelError: names the kind.
    """
    name = str(getattr(method, "value", method))
    if name != BITSANDBYTES:
        raise UnsupportedModelError(
            f"quantization by {name!r}: stages were compared with bitsandbytes' 4-bit and 8-bit matrices only; load the "
            "model with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4') or (load_in_8bit=True) from an "
            "unquantized checkpoint, or turn it back (model.dequantize()) where its kind allows"
        )
