"""Matrices packed by torchao over two processes, of which each packs its own: the numbers of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import peft
from rig import in_processes
from torchao_cases import packed, quantization, quantization_of, wrapped
from torchao_cases import saved as saved_base
from trainer_helpers import EVERY, differing, split_options, trained
from trainer_runs import held, whole
from transformers import TorchAoConfig

from hf_ouroboros import AutoStagedModelForCausalLM, OuroborosArguments, UnsupportedModelError
from hf_ouroboros.partition.packed import packed_linears, scales, values

RUN: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_stages": 2}
CASES = ["lora on llama", "lora on qwen3"] if EVERY else ["lora on llama"]


def in_parts(folder: Path, case: str) -> Any:
    """As `packed`, of which each process has packed its own matrices only."""
    args = OuroborosArguments(output_dir=str(folder), use_cpu=True, num_stages=2)
    tensor = quantization_of.Int8Tensor
    count, quantize = [], tensor.from_hp.__func__

    def counting(kind: type, matrix: torch.Tensor, **options: Any) -> Any:
        count.append(not matrix.is_meta)
        return quantize(kind, matrix, **options)

    tensor.from_hp = classmethod(counting)
    try:
        model = AutoStagedModelForCausalLM.from_pretrained(
            saved_base(case, folder), args=args, frozen=True, quantization_config=quantization()
        )
    finally:
        tensor.from_hp = classmethod(quantize)
    alone = packed(case, folder)
    assert model.config.to_dict() == alone.config.to_dict()
    modules, others = dict(packed_linears(model)), dict(packed_linears(alone))
    assert modules.keys() == others.keys()
    own = [name for name, module in modules.items() if not module.weight.is_meta]
    assert 0 < len(own) < len(modules) and sum(count) == len(own)
    for name, module in modules.items():
        mine, theirs = values(module), values(others[name])
        assert type(module.weight) is type(others[name].weight) and module.weight.dtype == others[name].weight.dtype
        assert name in own or (not scales(module) and mine[0].is_meta)
        assert differing(mine if name in own else [], theirs if name in own else []) == []
    return model


def train_part(rank: int, folder: str) -> list[dict[str, Any]]:
    """One process of the two: packed in parts, then whole, then what is refused."""
    found = []
    for case in CASES:
        base = Path(folder, case)
        model = adapted_in_parts(in_parts(base, case), case, base)
        trainer = trained(f"{folder}/{case}/parts", {"model": model}, **RUN)
        trainer.save_model(f"{folder}/{case}/parts/saved")
        trainer.evaluate()
        foreign = [module for _, module in packed_linears(model) if module.weight.is_meta]
        assert foreign and not any(scales(module) for module in foreign)
        found.append(held(trainer) | {"rows": rows(trainer)})
        again = trained(  # of a model that each process has loaded whole, of which it keeps its own
            f"{folder}/{case}/again",
            {"model": wrapped(case, base)},
            resume=f"{folder}/{case} here/checkpoint-2",
            **RUN,
        )
        assert any(module.weight.is_meta for _, module in packed_linears(again.model))
        assert not any(scales(module) for _, module in packed_linears(again.model) if module.weight.is_meta)
        found.append(held(again) | {"rows": rows(again)})
    args = OuroborosArguments(output_dir=folder, use_cpu=True, num_stages=2)
    with pytest.raises(UnsupportedModelError, match="was saved as torchao has packed it"):
        AutoStagedModelForCausalLM.from_pretrained(f"{folder}/packed", args=args)
    floating = TorchAoConfig(quantization_of.Float8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(UnsupportedModelError, match=r"TorchAoConfig\(Float8WeightOnlyConfig\)"):
        AutoStagedModelForCausalLM.from_pretrained(base, args=args, quantization_config=floating)
    return found


def rows(trainer: Any) -> list[Any]:
    """Parameters and bytes of each stage, counted as packed."""
    return [(row.parameters, row.parameter_bytes) for row in trainer.stage_plan.rows]


def adapted_in_parts(model: Any, case: str, folder: Path) -> Any:
    """The model with adapters that have the values of `wrapped`, as far as they are here."""
    model = peft.get_peft_model(model, wrapped(case, folder).peft_config["default"])
    given = dict(wrapped(case, folder).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.data.copy_(given[name])
    return model


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    expected = []
    for case in CASES:
        options = {**RUN, **split_options(2, 2), "schedule": "reference"}
        expected.append(trained(tmp_path / f"{case} here", {"model": wrapped(case, tmp_path / case)}, **options))
    packed(CASES[0], tmp_path / CASES[0]).save_pretrained(tmp_path / "packed")
    parts = in_processes(2, train_part, str(tmp_path), limit=300)
    found = [whole([{**part[i], "log": []} for part in parts]) for i in range(len(parts[0]))]
    for i, case in enumerate(CASES):
        here = held(expected[i])
        for run in found[2 * i : 2 * i + 2]:
            assert differing(trained_only(here), trained_only(run)) == []
            assert run["flos"] == pytest.approx(here["flos"])
            assert run["rows"] == rows(expected[i])
        base = packed(case, tmp_path / case)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / case / "parts" / "saved", is_trainable=True)
        mine = {name: p.detach() for name, p in loaded.named_parameters() if p.requires_grad}
        assert differing(trained_only(here)["weights"], mine) == []


def trained_only(run: dict[str, Any]) -> dict[str, Any]:
    """Adapters' weights and optimizer state."""
    return {"weights": {n: w for n, w in run["weights"].items() if "lora" in n}, "optimizer": run["optimizer"]}
