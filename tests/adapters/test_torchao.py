"""Adapters on matrices that torchao has packed: the reference's numbers, stock Trainer's, memory as packed."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import peft, trained_state
from torch.utils._python_dispatch import TorchDispatchMode
from torchao_cases import adapted, packed, quantization, quantization_of, saved, wrapped
from trainer_helpers import EVERY, differing, ouroboros, outcome, split_options, stock, trained
from transformers import AutoModelForCausalLM, TorchAoConfig

from hf_ouroboros import AutoStagedModelForCausalLM, OuroborosArguments, UnsupportedModelError
from hf_ouroboros.errors import CheckpointMismatchError
from hf_ouroboros.partition.finite import check_finite
from hf_ouroboros.partition.packed import packed_linears, place, scales, sizes, values
from hf_ouroboros.partition.packed_loading import Packing
from hf_ouroboros.partition.packed_tensors import make_lean

RUN: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 1, **split_options(3, 2)}
SYNCHRONOUS: dict[str, Any] = {"max_steps": 2, "schedule": "1f1b", "max_grad_norm": 0.0, **split_options(3, 2)}
CASE = "lora on llama"
CASES = [CASE, "lora on qwen3", "lora on gemma3", "rslora", "vera"] if EVERY else [CASE, "lora on qwen3"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_pipelined_is_the_reference(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    before = trained_state(wrapped(case, folder))
    expected = trained(tmp_path / "reference", {"model": wrapped(case, folder)}, schedule="reference", **RUN)
    model = wrapped(case, folder)
    here = {name: values(module) for name, module in packed_linears(model)}
    copies = {name: [tensor.clone() for tensor in tensors] for name, tensors in here.items()}
    found = trained(tmp_path / "pipelined", {"model": model}, **RUN)
    assert differing(adapters(expected), adapters(found)) == []
    assert len(differing(before, trained_state(found.model))) == len(before)
    assert here
    for name, module in packed_linears(found.model):  # one version, in its place
        assert values(module)[0].data_ptr() == here[name][0].data_ptr()
        assert differing(copies[name], values(module)) == []


@pytest.mark.parametrize("case", CASES)
def test_without_delay_it_is_stock_trainer(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    expected = stock(tmp_path / "stock", {"model": wrapped(case, folder)}, max_steps=2, max_grad_norm=0.0)
    expected.train()
    found = trained(tmp_path / "1f1b", {"model": wrapped(case, folder)}, **SYNCHRONOUS)
    assert differing(adapters(expected), adapters(found)) == []


@pytest.mark.slow
def test_a_packed_head(tmp_path: Path) -> None:
    """Which is packed where the configuration's own exceptions don't name it."""
    runs: list[Any] = []
    for schedule in ("stock", "1f1b", "reference", "pipelined"):
        model = wrapped(CASE, tmp_path / "base", quantization(modules_to_not_convert=["none"]))
        assert model.get_output_embeddings() in [module for _, module in packed_linears(model)]
        if schedule == "stock":
            runs.append(stock(tmp_path / schedule, {"model": model}, max_steps=2, max_grad_norm=0.0))
            runs[0].train()
        else:
            given = {**SYNCHRONOUS} if schedule == "1f1b" else {**RUN, "schedule": schedule}
            runs.append(trained(tmp_path / schedule, {"model": model}, **given))
    assert differing(adapters(runs[0]), adapters(runs[1])) == []
    assert differing(adapters(runs[2]), adapters(runs[3])) == []


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"recompute": True}, {"bf16": True}, {"delay_compensation": "auto"}], ids=str)
def test_other_ways_to_run_are_the_reference(given: dict[str, Any], tmp_path: Path) -> None:
    """With dropout in the adapters, evaluations in between, and as PEFT prepares a model for it."""
    given = {**RUN, "eval_strategy": "steps", "eval_steps": 1, **given}

    def made() -> Any:
        model = packed(CASE, tmp_path / "base", dtype=torch.bfloat16 if "bf16" in given else None)
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model.enable_input_require_grads()
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]))

    runs = []
    for more in ({"schedule": "reference", "recompute": False}, {}):
        runs.append(trained(tmp_path / str(len(runs)), {"model": made()}, **{**given, **more}))
    assert differing(adapters(runs[0]), adapters(runs[1])) == []


@pytest.mark.slow
def test_resumes_and_loads(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    options = {**RUN, "save_strategy": "steps", "save_steps": 2}
    trainer = trained(tmp_path / "run", {"model": wrapped(CASE, folder)}, **options)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not [path for path in checkpoint.iterdir() if path.name.startswith("model")]
    again = trained(tmp_path / "again", {"model": wrapped(CASE, folder)}, resume=checkpoint, **options)
    assert differing(adapters(trainer), adapters(again)) == []
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(packed(CASE, folder), tmp_path / "saved", is_trainable=True)
    assert differing(trained_state(trainer.model), trained_state(loaded)) == []
    for index in (0, 1):  # rows, scales
        other = wrapped(CASE, folder)
        values(next(packed_linears(other))[1])[index].mul_(2)
        with pytest.raises(CheckpointMismatchError, match="frozen weights are not those"):
            trained(tmp_path / "other", {"model": other}, resume=checkpoint, **options)


@pytest.mark.slow
def test_a_checkpoint_that_was_saved_packed(tmp_path: Path) -> None:
    packed(CASE, tmp_path / "base").save_pretrained(tmp_path / "packed")
    runs = []
    for folder, schedule in (("base", "reference"), ("packed", "pipelined")):
        args = OuroborosArguments(output_dir=str(tmp_path), use_cpu=True, **split_options(3, 2))
        given = {"quantization_config": quantization()} if folder == "base" else {}
        model = AutoStagedModelForCausalLM.from_pretrained(tmp_path / folder, args=args, frozen=True, **given)
        assert any(packed_linears(model))
        runs.append(trained(tmp_path / schedule, {"model": adapted(model, CASE)}, **{**RUN, "schedule": schedule}))
    assert differing(*(trained_state(run.model) for run in runs)) == []


class Unpacked(TorchDispatchMode):
    """Notes matrices that are made of int8, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.living: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype is torch.int8 and args[0].dim() == 2:
            self.living.append(weakref.ref(made))
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
@pytest.mark.parametrize("autocast", [False, True])
def test_pending_backwards_keep_matrices_packed(granularity: str, dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    how = quantization(getattr(quantization_of, granularity)()).quant_type
    plain, lean = (torch.nn.Linear(48, 32, dtype=dtype) for _ in range(2))
    lean.load_state_dict(plain.state_dict())
    inputs = torch.randn(2, 32, 48).to(dtype)  # of as many tokens as rows
    kept, gradients = [], []
    for module in (plain, lean):
        quantization_of.quantize_(module, how)
        if module is lean:
            make_lean(module)
        given = inputs.clone().requires_grad_()
        with Unpacked() as mode, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            product = module(given)
        kept.append(sum(made() is not None for made in mode.living))
        assert mode.living
        product.float().square().sum().backward()
        gradients.append([product.detach(), given.grad, module.bias.grad])
    assert differing(*gradients) == []
    assert kept[1] == 0 and (autocast or kept[0] == 1)


def test_sizes_are_those_of_what_is_packed(tmp_path: Path) -> None:
    model, plain = packed(CASE, tmp_path / "base"), AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    real = sizes(model.parameters(), model)
    for _, module in packed_linears(model):
        rows, columns = module.weight.shape
        assert real[id(module.weight)] == (rows * columns, rows * columns + 5 * rows)
    assert sum(size.elements for size in real.values()) == sum(p.numel() for p in plain.parameters())
    trainer = trained(tmp_path, {"model": adapted(model, CASE)}, max_steps=1, **split_options(3, 2))
    trainer.create_model_card()
    whole = peft.get_peft_model(plain, trainer.model.peft_config["default"]).num_parameters()
    assert sum(row.parameters for row in trainer.stage_plan.rows) == whole
    assert f"of {whole:,} parameters trained" in (tmp_path / "README.md").read_text()


def test_matrices_move_whole(tmp_path: Path) -> None:
    """To a device without memory, where they stay the same objects."""
    model = packed(CASE, tmp_path / "base")
    check_finite(model)
    before = [module.weight for _, module in packed_linears(model)]
    place(model, torch.device("meta"))
    modules = [module for _, module in packed_linears(model)]
    assert before and len(modules) == len(before)
    for module, weight in zip(modules, before, strict=True):
        assert module.weight is weight and weight.is_meta and not scales(module)
        assert all(tensor.is_meta for tensor in (weight.qdata, weight.scale, weight.zero_point))


def test_refusals(tmp_path: Path) -> None:
    folder = tmp_path / "base"

    def refused(model: Any, words: str) -> None:
        with pytest.raises(UnsupportedModelError, match=words):
            ouroboros(tmp_path, {"model": model}, **split_options(3, 2))

    refused(packed(CASE, folder), "is quantized: its matrices are packed .* only adapters")
    groups = quantization(quantization_of.PerGroup(32))
    refused(wrapped(CASE, folder, groups), "scales for groups within a row")
    dynamic = TorchAoConfig(quantization_of.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    refused(wrapped(CASE, folder, dynamic), "rounds its input, too")
    floating = TorchAoConfig(quantization_of.Float8WeightOnlyConfig(set_inductor_config=False))
    refused(wrapped(CASE, folder, floating), "torchao's Float8Tensor, the parameter .*q_proj.*weight")
    model = wrapped(CASE, folder)
    quantization_of.quantize_(model.get_input_embeddings(), quantization().quant_type, lambda module, name: True)
    refused(model, "torchao's Int8Tensor, the parameter .*embed_tokens")
    refused(wrapped("lora on gpt2", tmp_path / "gpt2"), "torchao has packed nothing of this GPT2LMHeadModel")
    unmarked = AutoModelForCausalLM.from_pretrained(saved(CASE, folder))  # packed without Transformers
    quantization_of.quantize_(unmarked.model, floating.quant_type)
    refused(unmarked, "torchao's Float8Tensor")
    with pytest.raises(UnsupportedModelError, match="torch_compile with a quantized model"):
        trained(tmp_path, {"model": wrapped(CASE, folder)}, torch_compile=True, max_steps=1, **split_options(3, 2))
    both = quantization(include_input_output_embeddings=True)
    for how, words in ((dynamic, "Int8DynamicActivationInt8WeightConfig"), (both, "leave it False")):
        with pytest.raises(UnsupportedModelError, match=words):
            Packing(how)
    assert type(Packing(quantization().to_dict()).config.quant_type) is quantization_of.Int8WeightOnlyConfig


def adapters(trainer: Any) -> dict[str, Any]:
    """Weights that are trained, optimizer state and logs."""
    found = dict(outcome(trainer))
    found["weights"] = trained_state(trainer.model)
    return found
