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
from transformers.quantizers.quantizers_utils import should_convert_module

from ..errors import UnsupportedModelError
from .packed import forget_foreign
from .packed_tensors import TORCHAO

BITSANDBYTES = "bitsandbytes"
EXCEPTIONS = {BITSANDBYTES: "llm_int8_skip_modules", TORCHAO: "modules_to_not_convert"}
"""Libraries, and how their configurations call modules that stay as they are."""


class Packing:
    """How linear modules of a model are packed.

    Args:
        config: a `BitsAndBytesConfig`, a `TorchAoConfig` of weights as int8, or one as a dict.

    Raises:
        UnsupportedModelError: another kind of quantization, or its library is not installed.
    """

    def __init__(self, config: Any):
        try:
            self.config = AutoQuantizationConfig.from_dict(dict(config)) if isinstance(config, dict) else config
        except ImportError:
            raise UnsupportedModelError("a TorchAoConfig needs torchao: pip install 'hf_ouroboros[torchao]'") from None
        self._library = check_method(getattr(self.config, "quant_method", type(config).__name__))
        if self._library == TORCHAO:
            _check_torchao(self.config)
            return
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise UnsupportedModelError(
                "a BitsAndBytesConfig needs bitsandbytes: pip install 'hf_ouroboros[bnb]'"
            ) from None

    def exceptions(self, model: PreTrainedModel) -> list[str]:
        """Patterns of the modules that stay as they are: head, tied modules, and those that the configuration names."""
        given, kept = getattr(self.config, EXCEPTIONS[self._library]), model._keep_in_fp32_modules
        return sorted(HfQuantizer.get_modules_to_not_convert(model, given, None if kept is None else list(kept)))

    def check_saved(self, name: Any) -> None:
        """Refuses what a process can't read in parts.

        Raises:
            UnsupportedModelError: it was packed by torchao before it was saved.
        """
        if self._library == TORCHAO:
            raise UnsupportedModelError(
                f"{name} was saved as torchao has packed it, and Transformers would read all of it in every process; load an "
                "unquantized checkpoint with quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), or train in one process"
            )

    def of_own(self, model: PreTrainedModel, foreign: Sequence[str]) -> Any:
        """The configuration for loading a part.

        Args:
            model: a skeleton, with plain modules.
            foreign: names of the parameters that are not loaded.
        """
        modules = {name.rpartition(".")[0] for name in foreign}
        linear = [name for name in sorted(modules) if isinstance(model.get_submodule(name), (nn.Linear, Conv1D))]
        own = copy.copy(self.config)
        setattr(own, EXCEPTIONS[self._library], [*self.exceptions(model), *map(re.escape, linear)])
        return own

    def of_meta(self, model: PreTrainedModel, exceptions: Sequence[str]) -> None:
        """Exchanges the plain linear modules of a model, which are on the meta device, for packed ones without values."""
        if self._library == TORCHAO:
            self._pack_on_meta(model, exceptions)
            return
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

    def _pack_on_meta(self, model: PreTrainedModel, exceptions: Sequence[str]) -> None:
        """Lets torchao pack what has no values, as Transformers chooses: by the names of weights."""
        from torchao.quantization import quantize_

        for name, module in model.named_modules():
            here = not isinstance(module, nn.Linear) or not module.weight.is_meta
            if not here and should_convert_module(f"{name}.weight", list(exceptions)):
                quantize_(module, self.config.quant_type)


def check_method(method: Any) -> str:
    """Refuses kinds of quantization that stages were not compared with.

    Returns:
        The library's name.

    Raises:
        UnsupportedModelError: names the kind.
    """
    name = str(getattr(method, "value", method))
    if name not in EXCEPTIONS:
        raise UnsupportedModelError(
            f"quantization by {name!r}: stages were compared with bitsandbytes' 4-bit and 8-bit matrices, and with torchao's "
            "int8 of weights, only; load the model with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4') or "
            "(load_in_8bit=True), or TorchAoConfig(Int8WeightOnlyConfig()), from an unquantized checkpoint, or turn it back "
            "(model.dequantize()) where its kind allows"
        )
    return name


def _check_torchao(config: Any) -> None:
    kind = type(config.quant_type).__name__
    if kind != "Int8WeightOnlyConfig":
        raise UnsupportedModelError(
            f"TorchAoConfig({kind}): of torchao's kinds stages were compared with TorchAoConfig(Int8WeightOnlyConfig()) only; "
            "load the model with it, or with BitsAndBytesConfig(load_in_4bit=True)"
        )
    if config.include_input_output_embeddings:
        raise UnsupportedModelError(
            "TorchAoConfig(include_input_output_embeddings=True): embedding and head are not packed in stages; leave it False"
        )
