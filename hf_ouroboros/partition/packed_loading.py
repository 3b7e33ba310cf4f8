"""Packing while loading, in parts: Transformers packs a process's own matrices one by one and leaves the others alone.

What is foreign is a plain linear module on the meta device until everything is read, and is exchanged then, so that modules,
shapes and dtypes are the same in all processes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from importlib.util import find_spec
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
from .packed_tensors import QUANTO, TORCHAO

BITSANDBYTES = "bitsandbytes"
EXCEPTIONS = {
    BITSANDBYTES: "llm_int8_skip_modules",
    TORCHAO: "modules_to_not_convert",
    QUANTO: "modules_to_not_convert",
}
"""Libraries, and how their configurations call modules that stay as they are."""


class Packing:
    """How linear modules of a model are packed.

    Args:
        config: a `BitsAndBytesConfig`, a `TorchAoConfig` or `QuantoConfig` of weights as int8, or one as a dict.

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
        elif self._library == QUANTO:
            _check_quanto(self.config)
        elif not find_spec("bitsandbytes"):
            raise UnsupportedModelError("a BitsAndBytesConfig needs bitsandbytes: pip install 'hf_ouroboros[bnb]'")

    def exceptions(self, model: PreTrainedModel) -> list[str]:
        """Patterns of the modules that stay as they are: head, tied modules, and those that the configuration names."""
        given, kept = getattr(self.config, EXCEPTIONS[self._library]), model._keep_in_fp32_modules
        return sorted(HfQuantizer.get_modules_to_not_convert(model, given, None if kept is None else list(kept)))

    def check_saved(self, name: Any) -> None:
        """Refuses what a process can't read in parts.

        Raises:
            UnsupportedModelError: it was packed by torchao or quanto before it was saved.
        """
        if self._library != BITSANDBYTES:
            raise UnsupportedModelError(
                f"{name} was saved as {self._library} has packed it, and Transformers would read all of it in every process; "
                "load an unquantized checkpoint with quantization_config=..., or train in one process"
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
        if self._library != BITSANDBYTES:
            self._pack_on_meta(model, list(exceptions))
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

    def _pack_on_meta(self, model: PreTrainedModel, exceptions: list[str]) -> None:
        """Lets a library pack what has no values, as Transformers chooses: for torchao by the names of weights."""
        end = ".weight" if self._library == TORCHAO else ""
        for name, module in list(model.named_modules()):
            here = not isinstance(module, nn.Linear) or not module.weight.is_meta
            if here or not should_convert_module(name + end, exceptions):
                continue
            if self._library == TORCHAO:
                from torchao.quantization import quantize_

                quantize_(module, self.config.quant_type)
            else:
                model.set_submodule(name, _by_quanto(module))


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
            f"quantization by {name!r}: stages were compared with bitsandbytes' 4-bit and 8-bit matrices, and with int8 weights "
            "of torchao and quanto, only; load the model with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4') "
            "or (load_in_8bit=True), TorchAoConfig(Int8WeightOnlyConfig()) or QuantoConfig(weights='int8'), from an unquantized "
            "checkpoint, or turn it back (model.dequantize()) where its kind allows"
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


def _check_quanto(config: Any) -> None:
    if not find_spec("optimum") or not find_spec("optimum.quanto"):
        raise UnsupportedModelError("a QuantoConfig needs quanto: pip install 'hf_ouroboros[quanto]'")
    if config.weights != "int8" or config.activations is not None:
        raise UnsupportedModelError(
            f"QuantoConfig(weights={config.weights!r}, activations={config.activations!r}): of quanto's kinds stages were "
            "compared with QuantoConfig(weights='int8') only; load the model with it, or with BitsAndBytesConfig(load_in_4bit=True)"
        )


def _by_quanto(module: nn.Module) -> nn.Module:
    """What stands for a linear module on the meta device, as Transformers leaves it after packing."""
    from optimum.quanto import QLinear, qint8

    linear: Any = module
    with torch.device("meta"):
        made = QLinear.qcreate(linear, qint8)
    made.freeze()
    made.weight.requires_grad = False
    made.input_scale, made.output_scale = torch.ones(()), torch.ones(())
    return made.train(linear.training)
