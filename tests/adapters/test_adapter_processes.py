"""Adapters over two processes: the reference's numbers, one file per adapter, checkpoints that cross over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import base, config, peft, trained_state, wrapped
from rig import in_processes
from trainer_helpers import differing, ouroboros, split_options, trained
from trainer_runs import held, whole

from hf_ouroboros import (
    AutoStagedModelForCausalLM,
    EngineError,
    OuroborosArguments,
    UnsupportedModelError,
    UnsupportedOptionError,
)

RUN: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_stages": 2}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
# Tied and frozen; with a tied matrix of two sides that is trained; one stage without anything that is trained; copies of the base.
KINDS = {"lora on gpt2": 2, "lora and tokens": 3, "last layers": 2, "lora on llama": 2}
LOWERED = {"lora on llama": {"bf16": True}}


def staged(folder: str, case: str) -> Any:
    """As `wrapped`, of a saved model of which each process loads its parts."""
    args = OuroborosArguments(output_dir=folder, use_cpu=True, num_stages=2)
    model = AutoStagedModelForCausalLM.from_pretrained(f"{folder}/base", args=args, frozen=True)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config(case))
    torch.manual_seed(1)
    alone = peft.get_peft_model(base(case), config(case))
    for parameter, value in zip(model.parameters(), alone.parameters(), strict=True):
        assert parameter.is_meta or torch.equal(parameter, value)  # initialised as in one process
    whole_model = wrapped(case)
    for parameter, value in zip(model.parameters(), whole_model.parameters(), strict=True):
        if parameter.requires_grad and not parameter.is_meta:
            parameter.data.copy_(value)
    return model


def train_part(rank: int, folder: str) -> list[dict[str, Any]]:
    found = []
    for case, stages in KINDS.items():
        options = {**RUN, "num_stages": stages, **LOWERED.get(case, {})}
        trainer = trained(
            f"{folder}/{case}",
            {"model": wrapped(case, lora_dropout=0.1) if case != "lora and tokens" else wrapped(case)},
            **options,
        )
        trainer.save_model(f"{folder}/{case}/saved")
        found.append(held(trainer) | {"sides": trainer.stage_plan.placement})
    again = trained(
        f"{folder}/again",
        {"model": wrapped("lora on gpt2", lora_dropout=0.1)},
        resume=f"{folder}/here/checkpoint-2",
        **RUN,
    )
    found.append(held(again))
    best = trained(f"{folder}/best", {"model": staged(folder, "lora on gpt2")}, **RUN, **BEST)
    assert sum(p.is_meta for p in best.model.parameters())
    found.append(held(best))
    with pytest.raises(EngineError, match="holds only its own stages"):
        best.model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    best.model.base_model.disable_adapter_layers()
    with pytest.raises(UnsupportedOptionError, match="_disable_adapters was changed after the trainer was made"):
        best.evaluate()
    plain = base("lora on gpt2")
    peft.inject_adapter_in_model(config("lora on gpt2"), plain)
    with pytest.raises(UnsupportedModelError, match="no PeftModel around it"):
        ouroboros(f"{folder}/plain", {"model": plain}, **RUN)
    return found


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    expected = {}
    base("lora on gpt2").save_pretrained(tmp_path / "base")
    for case, stages in KINDS.items():
        model = wrapped(case, lora_dropout=0.1) if case != "lora and tokens" else wrapped(case)
        options = {**RUN, **split_options(stages, 2), **LOWERED.get(case, {}), "schedule": "reference"}
        expected[case] = trained(
            tmp_path / ("here" if case == "lora on gpt2" else f"here {case}"), {"model": model}, **options
        )
    parts = in_processes(2, train_part, str(tmp_path), limit=300)
    *cases, again, best = [whole([{**part[i], "log": []} for part in parts]) for i in range(len(parts[0]))]
    for (case, trainer), found in zip(expected.items(), cases, strict=True):
        here = held(trainer)
        assert differing(here["weights"], found["weights"]) == []
        assert differing(here["optimizer"], found["optimizer"]) == []
        for folder in (tmp_path / case / "saved", tmp_path / case / "checkpoint-4"):
            loaded = peft.PeftModel.from_pretrained(base(case), folder).state_dict()
            assert differing(trainer.model.state_dict(), dict(loaded)) == []
            assert not [path for path in folder.rglob("*") if path.name.startswith((".", "model"))]
    assert cases[0]["sides"] == (0, 1)  # tied, but frozen
    assert differing(held(expected["lora on gpt2"])["weights"], again["weights"]) == []
    case = "lora on gpt2"
    back = trained(
        tmp_path / "back",
        {"model": wrapped(case, lora_dropout=0.1)},
        resume=tmp_path / case / "checkpoint-2",
        **{**RUN, **split_options(2, 2)},
    )
    assert differing(trained_state(expected[case].model), trained_state(back.model)) == []
    options = {**RUN, **BEST, **split_options(2, 2)}
    here = trained(tmp_path / "best here", {"model": wrapped(case)}, **options)
    assert differing(held(here)["weights"], best["weights"]) == []
