"""Adapters on matrices that torchao or quanto has packed: the reference's numbers, stock Trainer's, memory as packed."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import peft, trained_state
from int8_cases import (
    LIBRARIES,
    adapted,
    needs_quanto,
    needs_torchao,
    packed,
    quantization,
    saved,
    torchao_config,
    wrapped,
)
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_helpers import EVERY, differing, ouroboros, outcome, split_options, stock, trained
from transformers import AutoModelForCausalLM, QuantoConfig, TorchAoConfig

from hf_ouroboros import AutoStagedModelForCausalLM, OuroborosArguments, UnsupportedModelError
from hf_ouroboros.errors import CheckpointMismatchError
from hf_ouroboros.partition.finite import check_finite
from hf_ouroboros.partition.packed import packed_linears, place, scales, sizes, values
from hf_ouroboros.partition.packed_loading import Packing
from hf_ouroboros.partition.packed_tensors import make_lean, tensors_of

RUN: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 1, **split_options(3, 2)}
SYNCHRONOUS: dict[str, Any] = {"max_steps": 2, "schedule": "1f1b", "max_grad_norm": 0.0, **split_options(3, 2)}
CASE = "lora on llama"
CASES = [CASE, "lora on qwen3", "lora on gemma3", "rslora", "vera"] if EVERY else [CASE, "lora on qwen3"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_pipelined_is_the_reference(library: str, case: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    before = trained_state(wrapped(case, folder, library))
    expected = trained(tmp_path / "reference", {"model": wrapped(case, folder, library)}, schedule="reference", **RUN)
    model = wrapped(case, folder, library)
    here = {name: values(module) for name, module in packed_linears(model)}
    copies = {name: [tensor.clone() for tensor in tensors] for name, tensors in here.items()}
    found = trained(tmp_path / "pipelined", {"model": model}, **RUN)
    assert differing(adapters(expected), adapters(found)) == []
    assert len(differing(before, trained_state(found.model))) == len(before)
    assert here
    for name, module in packed_linears(found.model):  # one version, in its place
        assert values(module)[0].data_ptr() == here[name][0].data_ptr()
        assert differing(copies[name], values(module)) == []


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_without_delay_it_is_stock_trainer(library: str, case: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    expected = stock(tmp_path / "stock", {"model": wrapped(case, folder, library)}, max_steps=2, max_grad_norm=0.0)
    expected.train()
    found = trained(tmp_path / "1f1b", {"model": wrapped(case, folder, library)}, **SYNCHRONOUS)
    assert differing(adapters(expected), adapters(found)) == []


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.slow
def test_a_packed_head(library: str, tmp_path: Path) -> None:
    """Which is packed where the configuration's own exceptions don't name it."""
    runs: list[Any] = []
    for schedule in ("stock", "1f1b", "reference", "pipelined"):
        model = wrapped(CASE, tmp_path / "base", quantization(library, modules_to_not_convert=["none"]))
        assert model.get_output_embeddings() in [module for _, module in packed_linears(model)]
        if schedule == "stock":
            runs.append(stock(tmp_path / schedule, {"model": model}, max_steps=2, max_grad_norm=0.0))
            runs[0].train()
        else:
            given = {**SYNCHRONOUS} if schedule == "1f1b" else {**RUN, "schedule": schedule}
            runs.append(trained(tmp_path / schedule, {"model": model}, **given))
    assert differing(adapters(runs[0]), adapters(runs[1])) == []
    assert differing(adapters(runs[2]), adapters(runs[3])) == []


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.slow
@pytest.mark.parametrize("given", [{"recompute": True, "delay_compensation": "auto"}, {"bf16": True}], ids=str)
def test_other_ways_to_run_are_the_reference(library: str, given: dict[str, Any], tmp_path: Path) -> None:
    """With dropout in the adapters, evaluations in between, and as PEFT prepares a model for it."""
    given = {**RUN, "eval_strategy": "steps", "eval_steps": 1, **given}

    def made() -> Any:
        model = packed(CASE, tmp_path / "base", library, dtype=torch.bfloat16 if "bf16" in given else None)
        if library == "torchao" or "bf16" not in given:  # quanto's can't be made float32
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model.enable_input_require_grads()
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]))

    runs = []
    for more in ({"schedule": "reference", "recompute": False}, {}):
        runs.append(trained(tmp_path / str(len(runs)), {"model": made()}, **{**given, **more}))
    assert differing(adapters(runs[0]), adapters(runs[1])) == []


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.slow
def test_resumes_and_loads(library: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    options = {**RUN, "save_strategy": "steps", "save_steps": 2}
    trainer = trained(tmp_path / "run", {"model": wrapped(CASE, folder, library)}, **options)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not [path for path in checkpoint.iterdir() if path.name.startswith("model")]
    again = trained(tmp_path / "again", {"model": wrapped(CASE, folder, library)}, resume=checkpoint, **options)
    assert differing(adapters(trainer), adapters(again)) == []
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(packed(CASE, folder, library), tmp_path / "saved", is_trainable=True)
    assert differing(trained_state(trainer.model), trained_state(loaded)) == []
    for index in (0, 1):  # rows, scales
        other = wrapped(CASE, folder, library)
        values(next(packed_linears(other))[1])[index].mul_(2)
        with pytest.raises(CheckpointMismatchError, match="frozen weights are not those"):
            trained(tmp_path / "other", {"model": other}, resume=checkpoint, **options)


@needs_torchao
@pytest.mark.slow
def test_a_checkpoint_that_was_saved_packed(tmp_path: Path) -> None:
    packed(CASE, tmp_path / "base", "torchao").save_pretrained(tmp_path / "packed")
    runs = []
    for folder, schedule in (("base", "reference"), ("packed", "pipelined")):
        args = OuroborosArguments(output_dir=str(tmp_path), use_cpu=True, **split_options(3, 2))
        given = {"quantization_config": quantization("torchao")} if folder == "base" else {}
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


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
@pytest.mark.parametrize("autocast", [False, True])
def test_pending_backwards_keep_matrices_packed(granularity: str, dtype: torch.dtype, autocast: bool) -> None:
    from torchao.quantization import quantize_

    torch.manual_seed(0)
    how = torchao_config("Int8WeightOnly", granularity)
    plain, lean = (torch.nn.Linear(48, 32, dtype=dtype) for _ in range(2))
    lean.load_state_dict(plain.state_dict())
    inputs = torch.randn(2, 32, 48).to(dtype)  # of as many tokens as rows
    kept, gradients = [], []
    for module in (plain, lean):
        quantize_(module, how)
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


@pytest.mark.parametrize("library", LIBRARIES)
def test_sizes_are_those_of_what_is_packed(library: str, tmp_path: Path) -> None:
    model, plain = packed(CASE, tmp_path / "base", library), AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    real = sizes(model.parameters(), model)
    for _, module in packed_linears(model):
        rows, columns = module.weight.shape
        assert real[id(module.weight)] == (rows * columns, rows * (columns + (5 if library == "torchao" else 4)))
    assert sum(size.elements for size in real.values()) == sum(p.numel() for p in plain.parameters())
    trainer = trained(tmp_path, {"model": adapted(model, CASE)}, max_steps=1, **split_options(3, 2))
    trainer.create_model_card()
    whole = peft.get_peft_model(plain, trainer.model.peft_config["default"]).num_parameters()
    assert sum(row.parameters for row in trainer.stage_plan.rows) == whole
    assert f"of {whole:,} parameters trained" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("library", LIBRARIES)
def test_matrices_move_whole(library: str, tmp_path: Path) -> None:
    """To a device without memory, where they stay the same objects."""
    model = packed(CASE, tmp_path / "base", library)
    check_finite(model)
    before = [module.weight for _, module in packed_linears(model)]
    place(model, torch.device("meta"))
    modules = [module for _, module in packed_linears(model)]
    assert before and len(modules) == len(before)
    for module, weight in zip(modules, before, strict=True):
        assert module.weight is weight and weight.is_meta and not scales(module)
        assert all(tensor.is_meta for tensor in tensors_of(weight))


def refused(folder: Path, model: Any, words: str, **options: Any) -> None:
    """The trainer refuses the model."""
    with pytest.raises(UnsupportedModelError, match=words):
        ouroboros(folder, {"model": model}, **split_options(3, 2), **options)


@pytest.mark.parametrize("library", LIBRARIES)
def test_refusals(library: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    refused(tmp_path, packed(CASE, folder, library), "is quantized: its matrices are packed .* only adapters")
    words = f"{library} has packed nothing of this GPT2LMHeadModel"
    refused(tmp_path, wrapped("lora on gpt2", tmp_path / "gpt2", library), words)
    model = wrapped(CASE, folder, library)
    next(packed_linears(model))[1].weight.requires_grad = True
    refused(tmp_path, model, "is packed and can't be trained")
    with pytest.raises(UnsupportedModelError, match="torch_compile with a quantized model"):
        model = wrapped(CASE, folder, library)
        trained(tmp_path, {"model": model}, torch_compile=True, max_steps=1, **split_options(3, 2))


@needs_torchao
def test_other_kinds_of_torchao(tmp_path: Path) -> None:
    import torchao.quantization as library

    folder = tmp_path / "base"
    kinds = {
        "scales for groups within a row": torchao_config("Int8WeightOnly", "PerGroup"),
        "rounds its input, too": torchao_config("Int8DynamicActivationInt8Weight"),
        "torchao's Float8Tensor, the parameter .*q_proj.*weight": torchao_config("Float8WeightOnly"),
    }
    for words, kind in kinds.items():
        refused(tmp_path, wrapped(CASE, folder, TorchAoConfig(kind)), words)
    model = wrapped(CASE, folder, "torchao")
    library.quantize_(model.get_input_embeddings(), torchao_config("Int8WeightOnly"), lambda module, name: True)
    refused(tmp_path, model, "torchao's Int8Tensor, the parameter .*embed_tokens")
    unmarked = AutoModelForCausalLM.from_pretrained(saved(CASE, folder))  # packed without Transformers
    library.quantize_(unmarked.model, torchao_config("Float8WeightOnly"))
    refused(tmp_path, unmarked, "torchao's Float8Tensor")
    both = quantization("torchao", include_input_output_embeddings=True)
    for how, words in ((TorchAoConfig(kind), r"TorchAoConfig\(Float8WeightOnlyConfig\)"), (both, "leave it False")):
        with pytest.raises(UnsupportedModelError, match=words):
            Packing(how)
    read = Packing(quantization("torchao").to_dict()).config.quant_type
    assert type(read) is library.Int8WeightOnlyConfig


@needs_quanto
def test_other_kinds_of_quanto(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    refused(tmp_path, wrapped(CASE, folder, QuantoConfig(weights="float8")), "is of the kind qfloat8_e4m3fn, not int8")
    refused(tmp_path, wrapped(CASE, folder, QuantoConfig(weights="int4")), "optimum's WeightQBitsTensor, the parameter")
    refused(tmp_path, wrapped(CASE, folder, "quanto"), "load the model with dtype=torch.bfloat16", bf16=True)
    for how in (QuantoConfig(weights="int4"), QuantoConfig(weights="int8", activations="int8")):
        with pytest.raises(UnsupportedModelError, match="QuantoConfig"):
            Packing(how)
    assert Packing(quantization("quanto").to_dict()).config.weights == "int8"


def adapters(trainer: Any) -> dict[str, Any]:
    """Weights that are trained, optimizer state and logs."""
    found = dict(outcome(trainer))
    found["weights"] = trained_state(trainer.model)
    return found
