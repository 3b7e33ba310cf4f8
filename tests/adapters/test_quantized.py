"""Adapters on matrices that bitsandbytes has packed: the reference's numbers, stock Trainer's, files that plain PEFT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import peft, trained_state
from quantized_cases import KINDS, adapted, packed, quantization, saved, wrapped
from trainer_helpers import EVERY, differing, ouroboros, outcome, split_options, stock, trained
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig

from hf_ouroboros import (
    AutoStagedModelForCausalLM,
    OuroborosArguments,
    UnsupportedModelError,
    UnsupportedOptionError,
)
from hf_ouroboros.errors import CheckpointMismatchError
from hf_ouroboros.partition.finite import check_finite
from hf_ouroboros.partition.packed import packed_linears, place, scales, sizes
from hf_ouroboros.partition.packed_loading import Packing

RUN: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 1, **split_options(3, 2)}
SYNCHRONOUS: dict[str, Any] = {"max_steps": 2, "schedule": "1f1b", "max_grad_norm": 0.0, **split_options(3, 2)}
# All together with HF_OUROBOROS_EVERY_CASE=1; each kind and each model is in either way.
BOTH = [(case, kind) for case in ("lora on llama", "lora on gpt2") for kind in KINDS]
MORE = [("lora on qwen3", "double"), ("lora on gemma3", "nf4"), ("ia3", "int8"), ("vera", "nf4"), ("rslora", "int8")]
PIPELINED = (
    [*BOTH, ("dora", "nf4"), *MORE] if EVERY else [("lora on llama", "nf4"), ("lora on gpt2", "int8"), ("dora", "nf4")]
)
STOCK = [*BOTH, ("dora", "nf4"), *MORE] if EVERY else [("lora on gpt2", "double"), ("lora on llama", "int8")]
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("double", {"recompute": True}),
    ("int8", {"bf16": True}),
    ("nf4", {"delay_compensation": "auto", "optim": "paged_adamw_8bit"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind"), PIPELINED)
def test_pipelined_is_the_reference(case: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    before = trained_state(wrapped(case, kind, folder))
    expected = trained(tmp_path / "reference", {"model": wrapped(case, kind, folder)}, schedule="reference", **RUN)
    model = wrapped(case, kind, folder)
    places = {name: module.weight.data_ptr() for name, module in packed_linears(model)}
    values = {name: (module.weight.data.clone(), *scales(module)) for name, module in packed_linears(model)}
    found = trained(tmp_path / "pipelined", {"model": model}, **RUN)
    assert differing(outcome(expected), outcome(found)) == []
    assert len(differing(before, trained_state(found.model))) == len(before)
    assert places
    for name, module in packed_linears(found.model):  # one version, in its place
        assert module.weight.data_ptr() == places[name]
        assert differing(values[name], (module.weight.data, *scales(module))) == []


@pytest.mark.slow
def test_any_storage(tmp_path: Path) -> None:
    """Packed bits may lie in a floating dtype, in which some of them are no numbers."""
    case, given = "lora on llama", {"bnb_4bit_quant_storage": torch.bfloat16}
    runs = []
    for schedule in ("reference", "pipelined"):
        model = adapted(packed(case, "nf4", tmp_path / "base", **given), case)
        for _, module in packed_linears(model):
            module.weight.data.view(torch.uint8)[:2] = 0xFF  # NaN
        check_finite(model)
        runs.append(trained(tmp_path / schedule, {"model": model}, **{**RUN, "schedule": schedule}))
    assert differing(*(trained_state(run.model) for run in runs)) == []


@pytest.mark.parametrize(("case", "kind"), STOCK)
def test_without_delay_it_is_stock_trainer(case: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    expected = stock(tmp_path / "stock", {"model": wrapped(case, kind, folder)}, max_steps=2, max_grad_norm=0.0)
    expected.train()
    found = trained(tmp_path / "1f1b", {"model": wrapped(case, kind, folder)}, **SYNCHRONOUS)
    assert differing(outcome(expected), outcome(found)) == []
    assert found.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], rel=0.05)  # by tokens here


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "given"), [(kind, way) for kind in KINDS for _, way in WAYS] if EVERY else WAYS, ids=str
)
def test_other_ways_to_run_are_the_reference(kind: str, given: dict[str, Any], tmp_path: Path) -> None:
    """With dropout in the adapters, evaluations in between, and as PEFT prepares a model for it."""
    case, folder = "lora on llama", tmp_path / "base"
    given = {**RUN, "eval_strategy": "steps", "eval_steps": 1, **given}

    def made() -> Any:
        model = peft.prepare_model_for_kbit_training(packed(case, kind, folder), use_gradient_checkpointing=False)
        model.enable_input_require_grads()
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]))

    runs = []
    for more in ({"schedule": "reference", "recompute": False}, {}):
        runs.append(trained(tmp_path / str(len(runs)), {"model": made()}, **{**given, **more}))
    assert differing(outcome(runs[0]), outcome(runs[1])) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS) if EVERY else ["double"])
def test_resumes_and_loads(kind: str, tmp_path: Path) -> None:
    case, folder = "lora on llama", tmp_path / "base"
    options = {**RUN, "save_strategy": "steps", "save_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trained(tmp_path / "run", {"model": wrapped(case, kind, folder)}, **options)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not [path for path in checkpoint.iterdir() if path.name.startswith("model")]
    again = trained(tmp_path / "again", {"model": wrapped(case, kind, folder)}, resume=checkpoint, **options)
    assert differing(outcome(trainer), outcome(again)) == []
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(packed(case, kind, folder), tmp_path / "saved")
    assert differing(trainer.model.state_dict(), dict(loaded.state_dict())) == []
    other = wrapped(case, kind, folder)
    scales(next(packed_linears(other))[1])[0].mul_(2)
    with pytest.raises(CheckpointMismatchError, match="frozen weights are not those"):
        trained(tmp_path / "other", {"model": other}, resume=checkpoint, **options)


def test_sizes_are_those_of_what_is_packed(tmp_path: Path) -> None:
    for kind in KINDS:
        model = packed("lora on llama", kind, tmp_path / "base")
        real = sizes(model.parameters(), model)
        for _, module in packed_linears(model):
            held = [module.weight, *scales(module)]
            assert real[id(module.weight)].elements == module.in_features * module.out_features
            size = sum(t.numel() * t.element_size() for t in held if t.dim())
            assert real[id(module.weight)].bytes == size
        assert sum(size.elements for size in real.values()) == sum(
            p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "base").parameters()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_scales_follow_their_weights(kind: str, tmp_path: Path) -> None:
    """To a device without memory, before and after the first forward, which puts the scales of 8-bit elsewhere."""
    for forwards in (0, 1):
        model = packed("lora on llama", kind, tmp_path / "base")
        for _ in range(forwards):
            model(input_ids=torch.zeros(1, 4, dtype=torch.long))
        modules = [module for _, module in packed_linears(model)]
        assert all(scales(module) for module in modules)
        for module in modules:
            weight = torch.nn.Parameter(module.weight.data.to("meta"), requires_grad=False)
            vars(weight).update(vars(module.weight))
            module._parameters["weight"] = weight
        place(model, torch.device("meta"))
        assert modules and not any(scales(module) for module in modules)
        if kind == "int8":
            assert all(module.state.CB is None or module.state.CB.is_meta for module in modules)
        else:
            assert all(module.quant_state is module.weight.quant_state for module in modules)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS) if EVERY else ["double"])
def test_a_checkpoint_that_was_saved_packed(kind: str, tmp_path: Path) -> None:
    packed("lora on llama", kind, tmp_path / "base").save_pretrained(tmp_path / "packed")
    runs = []
    for folder, schedule in (("base", "reference"), ("packed", "pipelined")):
        args = OuroborosArguments(output_dir=str(tmp_path), use_cpu=True, **split_options(3, 2))
        given = {"quantization_config": quantization(kind)} if folder == "base" else {}
        model = AutoStagedModelForCausalLM.from_pretrained(tmp_path / folder, args=args, frozen=True, **given)
        model = adapted(model, "lora on llama")
        runs.append(trained(tmp_path / schedule, {"model": model}, **{**RUN, "schedule": schedule}))
    assert differing(*(trained_state(run.model) for run in runs)) == []


def test_plan_and_card_count_whole_matrices(tmp_path: Path) -> None:
    model = wrapped("lora on llama", "nf4", tmp_path / "base")
    trainer = trained(tmp_path, {"model": model}, max_steps=1, **split_options(3, 2))
    trainer.create_model_card()
    whole = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), model.peft_config["default"]
    ).num_parameters()
    assert sum(row.parameters for row in trainer.stage_plan.rows) == whole
    assert f"of {whole:,} parameters trained" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_32bit", "lion_8bit"] if EVERY else ["adamw_bnb_8bit"])
def test_optimizers_that_pack_moments(optim: str, tmp_path: Path) -> None:
    case, folder = "lora on llama", tmp_path / "base"
    runs = []
    for schedule in ("reference", "pipelined"):
        model = wrapped(case, "double", folder, r=64)
        given = {**RUN, "schedule": schedule, "optim": optim, "delay_compensation": "error_feedback"}
        runs.append(trained(tmp_path / schedule, {"model": model}, **given))
    assert differing(outcome(runs[0]), outcome(runs[1])) == []
    if EVERY:
        expected = stock(tmp_path / "stock", {"model": wrapped(case, "double", folder, r=64)}, max_steps=2, optim=optim)
        expected.args.max_grad_norm = 0.0
        expected.train()
        found = trained(tmp_path / "1f1b", {"model": wrapped(case, "double", folder, r=64)}, **SYNCHRONOUS, optim=optim)
        assert differing(trained_state(expected.model), trained_state(found.model)) == []
    given = {**RUN, "optim": optim, "delay_compensation": "weight_prediction"}
    with pytest.raises(UnsupportedOptionError, match="not (AdamW|Lion) of bitsandbytes"):
        trained(tmp_path / "predicted", {"model": wrapped(case, "double", folder)}, **given)


def test_refusals(tmp_path: Path) -> None:
    case, folder = "lora on llama", tmp_path / "base"

    def refused(model: Any, words: str) -> None:
        with pytest.raises(UnsupportedModelError, match=words):
            ouroboros(tmp_path, {"model": model}, **split_options(3, 2))

    refused(packed(case, "nf4", folder), "is quantized: its matrices are packed .* only adapters")
    model = wrapped(case, "nf4", folder)
    next(packed_linears(model))[1].weight.quant_state.packing_format_for_cpu = True
    refused(model, "repacked for inference on this CPU")
    model = wrapped(case, "nf4", folder)
    next(packed_linears(model))[1].weight.quant_state = None
    next(packed_linears(model))[1].quant_state = None
    refused(model, "not packed yet")
    model = wrapped(case, "int8", folder)
    next(packed_linears(model))[1].state.has_fp16_weights = True
    refused(model, "llm_int8_has_fp16_weight=True")
    model = peft.prepare_model_for_kbit_training(packed(case, "nf4", folder))
    refused(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])), "recompute=True")
    model = wrapped(case, "nf4", folder).requires_grad_(False)
    with pytest.raises((UnsupportedModelError, UnsupportedOptionError), match="(?s)train"):
        trained(tmp_path, {"model": model}, max_steps=1, **split_options(3, 2))
    model = AutoModelForCausalLM.from_pretrained(saved(case, folder))
    for method in ("gptq", "awq", "hqq"):
        model.quantization_method, model.is_quantized = method, True
        refused(model, f"quantization by '{method}'")
    with pytest.raises(UnsupportedModelError, match="quantization by 'gptq'"):
        Packing(GPTQConfig(bits=4))
    assert Packing(quantization("nf4").to_dict()).config.bnb_4bit_quant_type == "nf4"
    assert isinstance(Packing({"load_in_8bit": True, "quant_method": "bitsandbytes"}).config, BitsAndBytesConfig)
