"""Packed matrices over two processes: packed in parts, whole, or before they were saved, with the reference's numbers.

With bitsandbytes' own optimizer, which packs moments, as such models are usually trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import peft
from quantized_cases import packed, quantization, wrapped
from quantized_cases import saved as saved_base
from rig import in_processes
from trainer_helpers import EVERY, differing, split_options, trained
from trainer_runs import held, whole
from transformers import GPTQConfig

from hf_ouroboros import AutoStagedModelForCausalLM, OuroborosArguments, UnsupportedModelError
from hf_ouroboros.partition.packed import packed_linears, scales

RUN: dict[str, Any] = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "num_stages": 2,
    "optim": "adamw_bnb_8bit",
}
RANK = 96  # small moments are not packed
# Of GPT-2, whose matrices lie the other way round and have biases.
KINDS = {"double": "lora on gpt2", **({"int8": "lora on llama", "nf4": "lora on llama"} if EVERY else {})}


def in_parts(folder: Path, case: str, kind: str) -> Any:
    """As `packed`, of which each process has packed its own matrices only."""
    import bitsandbytes

    args = OuroborosArguments(output_dir=str(folder), use_cpu=True, num_stages=2)
    count, quantize = [], bitsandbytes.nn.Params4bit._quantize
    bitsandbytes.nn.Params4bit._quantize = lambda self, device: count.append(1) or quantize(self, device)
    try:
        model = AutoStagedModelForCausalLM.from_pretrained(
            saved_base(case, folder), args=args, frozen=True, quantization_config=quantization(kind)
        )
    finally:
        bitsandbytes.nn.Params4bit._quantize = quantize
    alone = packed(case, kind, folder)
    assert model.config.to_dict() == alone.config.to_dict()
    modules, others = dict(packed_linears(model)), dict(packed_linears(alone))
    assert modules.keys() == others.keys()
    own = [name for name, module in modules.items() if not module.weight.is_meta]
    assert 0 < len(own) < len(modules) and len(count) in (0, len(own))
    for name, module in modules.items():
        assert type(module.weight) is type(others[name].weight)
        assert (module.weight.shape, module.weight.dtype) == (others[name].weight.shape, others[name].weight.dtype)
        if name in own:
            mine, theirs = [module.weight.data, *scales(module)], [others[name].weight.data, *scales(others[name])]
            assert differing(mine, theirs) == []
        else:
            assert not scales(module)
    for parameter, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert parameter.dtype == other.dtype and (parameter.is_meta or torch.equal(parameter.data, other.data))
    return model


def with_values(model: Any, case: str, kind: str, folder: Path) -> Any:
    """The model with adapters that have the values of `wrapped`, as far as they are here."""
    model = peft.get_peft_model(model, wrapped(case, kind, folder, r=RANK).peft_config["default"])
    values = dict(wrapped(case, kind, folder, r=RANK).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.data.copy_(values[name])
    return model


def train_part(rank: int, folder: str) -> list[dict[str, Any]]:
    found = []
    for kind, case in KINDS.items():
        base = Path(folder, case)
        loaded = with_values(in_parts(base, case, kind), case, kind, base)
        args = OuroborosArguments(output_dir=folder, use_cpu=True, num_stages=2)
        saved = AutoStagedModelForCausalLM.from_pretrained(f"{base} {kind}", args=args, frozen=True)
        assert sum(p.is_meta for p in saved.parameters()) > 1
        saved = with_values(saved, case, kind, base)
        models = {"parts": loaded, "saved": saved}
        for name, model in models.items():
            trainer = trained(f"{folder}/{kind}/{name}", {"model": model}, **RUN)
            trainer.save_model(f"{folder}/{kind}/{name}/saved")
            trainer.evaluate()
            foreign = [module for _, module in packed_linears(model) if module.weight.is_meta]
            assert foreign and not any(scales(module) for module in foreign)
            assert all(getattr(module, "quant_state", None) is None for module in foreign)
            found.append(held(trainer) | {"parameters": [row.parameters for row in trainer.stage_plan.rows]})
        again = trained(  # of a model that each process has loaded whole
            f"{folder}/{kind}/again",
            {"model": wrapped(case, kind, base, r=RANK)},
            resume=f"{folder}/{kind} here/checkpoint-2",
            **RUN,
        )
        found.append(held(again))
    with pytest.raises(UnsupportedModelError, match="quantization by 'gptq'"):
        AutoStagedModelForCausalLM.from_pretrained(base, args=args, quantization_config=GPTQConfig(bits=4))
    return found


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    expected = []
    for kind, case in KINDS.items():
        options = {**RUN, **split_options(2, 2), "schedule": "reference"}
        folder = tmp_path / f"{kind} here"
        packed(case, kind, tmp_path / case).save_pretrained(tmp_path / f"{case} {kind}")
        expected.append(trained(folder, {"model": wrapped(case, kind, tmp_path / case, r=RANK)}, **options))
    parts = in_processes(2, train_part, str(tmp_path), limit=300)
    found = [whole([{**part[i], "log": []} for part in parts]) for i in range(len(parts[0]))]
    for i, (kind, case) in enumerate(KINDS.items()):
        here = held(expected[i])
        assert any(state["state1"].dtype is torch.uint8 for state in here["optimizer"].values())
        for run in found[3 * i : 3 * i + 3]:
            assert differing(trained_only(here), trained_only(run)) == []
            assert run["flos"] == pytest.approx(here["flos"])
        assert found[3 * i]["parameters"] == [row.parameters for row in expected[i].stage_plan.rows]
        base = packed(case, kind, tmp_path / case)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / kind / "parts" / "saved").state_dict()
        assert differing(expected[i].model.state_dict(), dict(loaded)) == []


def trained_only(run: dict[str, Any]) -> dict[str, Any]:
    """Weights and optimizer state; packed weights of both sides are one, of whichever class."""
    return {"weights": {n: w.data for n, w in run["weights"].items()}, "optimizer": run["optimizer"]}
