"""Every parameter is initialised, by us, with the documented distribution."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transfo_xl_cases import CUT, KINDS, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from hf_ouroboros.models.transfo_xl import TransfoXLLMHeadModel


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN, and torch's own modules don't initialise themselves."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    for cls in (nn.Linear, nn.Embedding, nn.LayerNorm):
        monkeypatch.setattr(cls, "reset_parameters", lambda self: None)
    yield


def not_finite(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]


@pytest.mark.parametrize("init", ("normal", "uniform"))
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_initialised(kind: str, init: str, poison: None) -> None:
    config = tiny_config(**KINDS[kind], init=init)
    assert not_finite(TransfoXLLMHeadModel(config)) == []
    assert not_finite(AutoModelForCausalLM.from_config(config)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_checkpoint_lacks_is_initialised(kind: str, tmp_path: Path, poison: None) -> None:
    model = tiny_model(**KINDS[kind])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in saved.items() if "layers.1." not in name and "crit" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not_finite(loaded) == []
    assert all(torch.equal(loaded.get_parameter(name), tensor) for name, tensor in kept.items())


def test_distributions() -> None:
    torch.manual_seed(0)
    model = TransfoXLLMHeadModel(
        tiny_config(d_model=64, d_embed=64, d_inner=64, n_head=8, d_head=8, vocab_size=400, cutoffs=CUT, div_val=2)
    )
    values: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if "layer_norm.weight" in name:
            group = "norm"
        elif "proj" in name:
            group = "projection"
        else:
            group = "zero" if name.endswith("bias") and "_r_" not in name and "_w_" not in name else "weight"
        values.setdefault(group, []).append(parameter.detach().flatten())
    moments = {group: torch.cat(parts) for group, parts in values.items()}
    for group, mean, std in (("weight", 0.0, 0.02), ("projection", 0.0, 0.01), ("norm", 1.0, 0.02)):
        # Four standard errors of mean and standard deviation.
        error = 4 / len(moments[group]) ** 0.5
        assert moments[group].mean() == pytest.approx(mean, abs=error * std)
        assert moments[group].std() == pytest.approx(std, rel=error)
    assert moments["zero"].abs().max() == 0


def test_uniform_range() -> None:
    model = TransfoXLLMHeadModel(tiny_config(init="uniform", init_range=0.05))
    weight = model.transformer.layers[0].dec_attn.qkv_net.weight
    assert weight.abs().max() <= 0.05 < weight.abs().max() * 1.2
