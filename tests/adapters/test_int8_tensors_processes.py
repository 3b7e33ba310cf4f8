"""Matrices packed by torchao or quanto over two processes, of which each packs its own: the numbers of one process."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from adapter_cases import peft
from int8_cases import LIBRARIES, packed, quantization, torchao_config, wrapped
from int8_cases import saved as saved_base
from rig import in_processes
from trainer_helpers import differing, split_options, trained
from trainer_runs import held, whole
from transformers import QuantoConfig, TorchAoConfig

from hf_ouroboros import AutoStagedModelForCausalLM, OuroborosArguments, UnsupportedModelError
from hf_ouroboros.partition.packed import packed_linears, scales, values

RUN: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_stages": 2}
CASE = "lora on llama"


def in_parts(folder: Path, library: str) -> Any:
    """As `packed`, of which each process has packed its own matrices only."""
    args = OuroborosArguments(output_dir=str(folder), use_cpu=True, num_stages=2)
    operations = {"torchao": "TorchAoQuantize", "quanto": "QuantoQuantize"}
    operation = getattr(import_module(f"transformers.integrations.{library}"), operations[library])
    with mock.patch.object(operation, "convert", autospec=True, side_effect=operation.convert) as packing:
        model = AutoStagedModelForCausalLM.from_pretrained(
            saved_base(CASE, folder), args=args, frozen=True, quantization_config=quantization(library)
        )
    alone = packed(CASE, folder, library)
    assert model.config.to_dict() == alone.config.to_dict()
    modules, others = dict(packed_linears(model)), dict(packed_linears(alone))
    assert modules.keys() == others.keys()
    own = [name for name, module in modules.items() if not module.weight.is_meta]
    assert 0 < len(own) < len(modules) and packing.call_count == len(own)
    for name, module in modules.items():
        mine, theirs = values(module), values(others[name])
        assert type(module) is type(others[name]) and type(module.weight) is type(others[name].weight)
        assert module.weight.dtype == others[name].weight.dtype
        assert differing(mine, theirs) == [] if name in own else mine[0].is_meta and not scales(module)
        assert {n: (b.shape, b.dtype) for n, b in module.named_buffers()} == {
            n: (b.shape, b.dtype) for n, b in others[name].named_buffers()
        }
    return model


def train_part(rank: int, folder: str, library: str) -> list[dict[str, Any]]:
    """One process of the two: packed in parts, then whole, then what is refused."""
    base = Path(folder, "base")
    model = with_values(in_parts(base, library), base, library)
    trainer = trained(f"{folder}/parts", {"model": model}, **RUN)
    trainer.save_model(f"{folder}/parts/saved")
    trainer.evaluate()
    foreign = [module for _, module in packed_linears(model) if module.weight.is_meta]
    assert foreign and not any(scales(module) for module in foreign)
    again = trained(  # of a model that each process has loaded whole, of which it keeps its own
        f"{folder}/again",
        {"model": wrapped(CASE, base, library)},
        resume=f"{folder}/here/checkpoint-2",
        **RUN,
    )
    foreign = [module for _, module in packed_linears(again.model) if module.weight.is_meta]
    assert foreign and not any(scales(module) for module in foreign)
    args = OuroborosArguments(output_dir=folder, use_cpu=True, num_stages=2)
    if library == "torchao":
        with pytest.raises(UnsupportedModelError, match="was saved as torchao has packed it"):
            AutoStagedModelForCausalLM.from_pretrained(f"{folder}/packed", args=args)
        other: Any = TorchAoConfig(torchao_config("Float8WeightOnly"))
    else:
        other = QuantoConfig(weights="float8")
    with pytest.raises(UnsupportedModelError, match="stages were compared with"):
        AutoStagedModelForCausalLM.from_pretrained(base, args=args, quantization_config=other)
    return [held(run) | {"rows": rows(run)} for run in (trainer, again)]


def rows(trainer: Any) -> list[Any]:
    """Parameters and bytes of each stage, counted as packed."""
    return [(row.parameters, row.parameter_bytes) for row in trainer.stage_plan.rows]


def with_values(model: Any, folder: Path, library: str) -> Any:
    """The model with adapters that have the values of `wrapped`, as far as they are here."""
    model = peft.get_peft_model(model, wrapped(CASE, folder, library).peft_config["default"])
    given = dict(wrapped(CASE, folder, library).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.data.copy_(given[name])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_two_processes(library: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    options = {**RUN, **split_options(2, 2), "schedule": "reference"}
    expected = trained(tmp_path / "here", {"model": wrapped(CASE, base, library)}, **options)
    if library == "torchao":
        packed(CASE, base, library).save_pretrained(tmp_path / "packed")
    parts = in_processes(2, train_part, str(tmp_path), library, limit=300)
    here = held(expected)
    for i in range(2):
        run = whole([{**part[i], "log": []} for part in parts])
        assert differing(adapters(here), adapters(run)) == []
        assert run["flos"] == pytest.approx(here["flos"])
        assert run["rows"] == rows(expected)
    saved = peft.PeftModel.from_pretrained(packed(CASE, base, library), tmp_path / "parts" / "saved", is_trainable=True)
    loaded = {name: p.detach() for name, p in saved.named_parameters() if p.requires_grad}
    assert differing(adapters(here)["weights"], loaded) == []


def adapters(run: dict[str, Any]) -> dict[str, Any]:
    """Their weights and optimizer state."""
    return {"weights": {n: w for n, w in run["weights"].items() if "lora" in n}, "optimizer": run["optimizer"]}
