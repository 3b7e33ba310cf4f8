"""Tiny models whose matrices torchao or quanto has packed as int8, with adapters on top; always the same weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import adapted, saved
from transformers import AutoModelForCausalLM, QuantoConfig, TorchAoConfig

INSTALLED = {
    "torchao": find_spec("torchao") is not None,
    "quanto": find_spec("optimum") is not None and find_spec("optimum.quanto") is not None,
}
LIBRARIES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not here, reason=f"needs the extra `{name}`: pip install -e '.[{name}]'"),
    )
    for name, here in INSTALLED.items()
]
needs_torchao, needs_quanto = (param.marks[0] for param in LIBRARIES)


def torchao_config(kind: str, granularity: str | None = None) -> Any:
    """A configuration of torchao's, which leaves torch's settings as they are."""
    import torchao.quantization as library

    given = {}
    if granularity is not None:
        given["granularity"] = getattr(library, granularity)(*([32] if granularity == "PerGroup" else []))
    return getattr(library, f"{kind}Config")(set_inductor_config=False, **given)


def quantization(library: str, **options: Any) -> Any:
    """Weights as int8, a scale per row."""
    if library == "quanto":
        return QuantoConfig(weights="int8", **options)
    return TorchAoConfig(torchao_config("Int8WeightOnly"), **options)


def packed(case: str, folder: Path, how: Any, **options: Any) -> Any:
    """The quantized model without adapters, as a script loads it.

    Args:
        how: a library's name, or a configuration.
    """
    how = quantization(how) if isinstance(how, str) else how
    return AutoModelForCausalLM.from_pretrained(saved(case, folder), quantization_config=how, **options)


def wrapped(case: str, folder: Path, how: Any, **options: Any) -> Any:
    """A quantized model with adapters."""
    return adapted(packed(case, folder, how), case, **options)
