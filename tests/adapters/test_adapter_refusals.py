"""Adapters that stages can't reproduce are refused by name, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_cases import GPT2, base, peft, wrapped
from trainer_helpers import ouroboros, split_options, tiny_model

from hf_ouroboros import UnsupportedModelError, UnsupportedOptionError

CAUSAL = {"task_type": "CAUSAL_LM"}
REFUSED: dict[str, tuple[Any, str]] = {
    "prompt": (lambda: peft.PromptTuningConfig(num_virtual_tokens=2, **CAUSAL), "virtual tokens in front"),
    "prefix": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL), "virtual tokens in front"),
    "p-tuning": (lambda: peft.PromptEncoderConfig(num_virtual_tokens=2, **CAUSAL), "virtual tokens in front"),
    "alora": (lambda: peft.LoraConfig(**GPT2, alora_invocation_tokens=[3], **CAUSAL), "alora_invocation_tokens"),
    "adalora": (lambda: peft.AdaLoraConfig(total_step=5, tinit=1, tfinal=1, **GPT2, **CAUSAL), "changes its ranks"),
    "unknown": (lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["lm_head"], **CAUSAL), "none of the kinds"),
    "both sides": (lambda: peft.LoraConfig(target_modules=["wte", "lm_head"], **CAUSAL), "one matrix .tied embeddings"),
    "both saved": (
        lambda: peft.LoraConfig(**GPT2, modules_to_save=["wte", "lm_head"], **CAUSAL),
        "one matrix .tied embeddings",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    model = peft.get_peft_model(tiny_model(dropout=0.0), make())
    with pytest.raises(UnsupportedModelError, match=words):
        ouroboros(tmp_path, {"model": model}, **split_options(3, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: peft.XLoraConfig(hidden_size=16, adapters={}), "a forward through the whole model that comes before"),
        (lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1), "virtual tokens"),
    ],
    ids=["x-lora", "adaption prompt"],
)
def test_refused_by_its_configuration(make: Any, words: str, tmp_path: Path) -> None:
    """Kinds that PEFT puts on models of other types, or on adapters that are saved already."""
    model = peft.get_peft_model(tiny_model(dropout=0.0), peft.LoraConfig(**GPT2, **CAUSAL))
    model.peft_config["default"] = make()
    with pytest.raises(UnsupportedModelError, match=words):
        ouroboros(tmp_path, {"model": model}, **split_options(3, 2))


def test_mixed_models_are_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model(dropout=0.0), peft.LoraConfig(**GPT2), mixed=True)
    with pytest.raises(UnsupportedModelError, match="PeftMixedModel"):
        ouroboros(tmp_path, {"model": model}, **split_options(3, 2))


def test_both_sides_of_an_untied_model_are_fine(tmp_path: Path) -> None:
    model = peft.get_peft_model(base("head"), peft.LoraConfig(target_modules=["wte", "lm_head"], **CAUSAL))
    ouroboros(tmp_path, {"model": model}, **split_options(3, 2))


@pytest.mark.parametrize(("name", "option"), [("muon", "muon_adapters"), ("basis_rotation", "rotate_adapters")])
def test_matrices_of_adapters_are_left_alone_unless_asked(name: str, option: str, tmp_path: Path) -> None:
    made = ouroboros(tmp_path, {"model": wrapped("lora on llama")}, delay_compensation=name, **split_options(3, 2))
    with pytest.raises(UnsupportedOptionError, match=f"has no matrix to train here: .*'{option}=true'"):
        made.create_optimizer()
    asked = {"delay_compensation": name, "delay_compensation_args": f"{option}=true", **split_options(3, 2)}
    trainer = ouroboros(tmp_path, {"model": wrapped("lora on llama")}, **asked)
    trainer.create_optimizer()
    groups = {group["algorithm"]: group["params"] for group in trainer.optimizer.param_groups}
    assert set(groups) == {"muon" if name == "muon" else "rotated"}
    assert len(groups[min(groups)]) == 2 * 3 * 3


def test_auto_leaves_the_optimizer_alone(tmp_path: Path) -> None:
    options = {"delay_compensation": "auto", "gradient_accumulation_steps": 1, **split_options(3, 2)}
    assert (
        str(ouroboros(tmp_path, {"model": wrapped("lora on llama")}, **options).delay_compensation)
        == "weight_prediction"
    )
    assert "muon" in str(ouroboros(tmp_path, {"model": base("lora on llama")}, **options).delay_compensation)
