"""Tiny models whose matrices torchao has packed as int8, with adapters on top; always the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import base, config, peft, stir
from transformers import AutoModelForCausalLM, TorchAoConfig

quantization_of = pytest.importorskip(
    "torchao.quantization", reason="needs the extra `torchao`: pip install -e '.[torchao]'"
)


def quantization(granularity: Any = None, **options: Any) -> TorchAoConfig:
    """Weights as int8, a scale per row unless another granularity is given; torch's settings stay as they are."""
    given = {} if granularity is None else {"granularity": granularity}
    return TorchAoConfig(quantization_of.Int8WeightOnlyConfig(set_inductor_config=False, **given), **options)


def saved(case: str, folder: Path) -> Path:
    """The unquantized model, in a folder."""
    if not folder.exists():
        base(case).save_pretrained(folder)
    return folder


def packed(case: str, folder: Path, how: TorchAoConfig | None = None, **options: Any) -> Any:
    """The quantized model without adapters, as a script loads it."""
    how = how or quantization()
    return AutoModelForCausalLM.from_pretrained(saved(case, folder), quantization_config=how, **options)


def adapted(model: Any, case: str, **options: Any) -> Any:
    """The model with its adapter, whose weights are none of those that it begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config(case, **options))
    stir(model, torch.Generator().manual_seed(1))
    return model


def wrapped(case: str, folder: Path, how: TorchAoConfig | None = None, **options: Any) -> Any:
    """A quantized model with adapters."""
    return adapted(packed(case, folder, how), case, **options)
