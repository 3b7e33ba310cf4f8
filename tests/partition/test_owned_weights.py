"""Loading the owned parameters: what `from_pretrained` gives, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_gpt2
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_ouroboros.errors import UnsupportedOptionError
from hf_ouroboros.partition.owned_weights import load_owned
from hf_ouroboros.partition.ownership import names_of_parameters

Owned = Callable[[str], bool]
LAYER = "transformer.h."
OWNED: dict[str, Owned] = {
    "embedding and first layers": lambda name: name.startswith(("transformer.wte", "transformer.wpe", LAYER + "0")),
    "head only": lambda name: name == "lm_head.weight",
    "last layers": lambda name: name.startswith((LAYER + "3", LAYER + "4", "transformer.ln_f")),
    "nothing": lambda name: False,
    "everything": lambda name: True,
}


def save(model: PreTrainedModel, layout: str, folder: Path) -> str:
    """Writes a checkpoint as users have them."""
    if layout == "base":  # as GPT-2 on the Hub: without the head, names without "transformer."
        model.base_model.save_pretrained(folder)
    elif layout == "bin":  # holds tied weights under both names
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="4KB" if layout == "sharded" else "1GB")
        assert len(list(folder.glob("*.safetensors"))) == 1 or layout == "sharded"
    return str(folder)


def assert_part(plain: PreTrainedModel, part: PreTrainedModel, owned: Owned) -> None:
    """`part` is `plain`, to the last bit, but for the values of foreign parameters."""
    assert type(part) is type(plain)
    assert part.training == plain.training
    assert part.config.to_dict() == plain.config.to_dict()
    assert not hasattr(part, "hf_device_map")
    assert [names for _, names in names_of_parameters(part)] == [names for _, names in names_of_parameters(plain)]
    pairs = zip(names_of_parameters(plain), names_of_parameters(part), strict=True)
    for (expected, names), (found, _) in pairs:
        assert (expected.shape, expected.dtype) == (found.shape, found.dtype)
        assert expected.requires_grad == found.requires_grad
        assert found.is_meta != any(map(owned, names))
        assert found.is_meta or torch.equal(expected, found)
    buffers = dict(part.named_buffers())
    assert list(buffers) == [name for name, _ in plain.named_buffers()]
    for name, expected in plain.named_buffers():
        assert torch.equal(expected, buffers[name])


def assert_loads_alike(path: str, owned: Owned, **kwargs: Any) -> PreTrainedModel:
    """Plain and partial loading agree, in values and in the random numbers they use."""
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    part = load_owned(path, owned, **kwargs)
    assert torch.equal(state, torch.get_rng_state())
    assert_part(plain, part, owned)
    return part


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize("owned", OWNED.values(), ids=OWNED)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["single", "sharded", "base", "bin"])
def test_owned_parameters_are_those_of_from_pretrained(layout: str, tied: bool, owned: Owned, tmp_path: Path) -> None:
    path = save(tiny_gpt2(tied), layout, tmp_path)
    assert_loads_alike(path, owned)
    assert_loads_alike(path, owned, dtype=torch.bfloat16)


def test_loaded_values_are_the_checkpoints(tmp_path: Path) -> None:
    model = tiny_gpt2()
    part = load_owned(save(model, "single", tmp_path), OWNED["last layers"])
    assert torch.equal(part.transformer.h[4].mlp.c_fc.weight, model.transformer.h[4].mlp.c_fc.weight)


@pytest.mark.parametrize("owned", OWNED.values(), ids=OWNED)
def test_weights_that_should_be_tied_but_differ_in_the_checkpoint(owned: Owned, tmp_path: Path) -> None:
    model = tiny_gpt2(tied=False)
    model.config.tie_word_embeddings = True
    path = save(model, "bin", tmp_path)
    assert len(names_of_parameters(assert_loads_alike(path, owned))) == len(list(model.parameters()))


def test_buffers_of_another_architecture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=19, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0))
    assert dict(model.named_buffers())
    part = assert_loads_alike(save(model, "sharded", tmp_path), lambda name: ".layers.1." in name)
    assert sum(not p.is_meta for p in part.parameters()) == 9


def test_arguments_reach_from_pretrained(tmp_path: Path) -> None:
    save(tiny_gpt2(), "single", tmp_path / "inner")
    owned = OWNED["embedding and first layers"]
    part = assert_loads_alike(str(tmp_path), owned, subfolder="inner", resid_pdrop=0.3, attn_implementation="eager")
    assert part.config.resid_pdrop == 0.3
    assert part.config._attn_implementation == "eager"
    part = load_owned(tmp_path / "inner", owned, model_class=GPT2LMHeadModel)
    assert type(part) is GPT2LMHeadModel


@pytest.mark.parametrize("owned", OWNED.values(), ids=OWNED)
def test_missing_parameters_are_initialised_as_in_the_whole_model(owned: Owned, tmp_path: Path) -> None:
    model = tiny_gpt2()
    path = save(model, "single", tmp_path)
    part = assert_loads_alike(path, owned, n_layer=7)  # two layers more than the checkpoint has
    if owned("everything"):
        assert part.transformer.h[6].mlp.c_fc.weight.std() > 0
    assert_loads_alike(path, owned, n_positions=20, ignore_mismatched_sizes=True)


def test_wrong_shapes_are_refused_as_by_from_pretrained(tmp_path: Path) -> None:
    path = save(tiny_gpt2(), "single", tmp_path)
    for load in (AutoModelForCausalLM.from_pretrained, lambda *a, **k: load_owned(*a, OWNED["last layers"], **k)):
        with pytest.raises(RuntimeError, match="mismatch"):
            load(path, n_positions=20)


def test_the_report_is_printed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tiny_gpt2(tied=False), "base", tmp_path)
    levels = []
    monkeypatch.setattr("transformers.modeling_utils.log_state_dict_report", lambda **_: levels.append(verbosity()))
    verbosity = logging.get_verbosity
    before = verbosity()
    logging.set_verbosity_warning()
    try:
        load_owned(path, OWNED["nothing"])
        with pytest.raises(OSError):
            load_owned(str(tmp_path / "absent"), OWNED["nothing"])
        assert levels == [logging.ERROR, logging.WARNING]
        assert verbosity() == logging.WARNING
    finally:
        logging.set_verbosity(before)


@pytest.mark.parametrize("key, value", [("device_map", "auto"), ("tp_plan", "auto"), ("state_dict", {})])
def test_arguments_that_place_parameters_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match=f"{key}=.* leave it out"):
        load_owned(str(tmp_path), OWNED["nothing"], **{key: value})
