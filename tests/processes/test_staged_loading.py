"""AutoStagedModelForCausalLM: every process gets its own stages, with the values of the unsplit model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rig import in_processes
from trainer_helpers import Rows, common_options, differing, tiny_model
from transformers import AutoModelForCausalLM, set_seed

from hf_ouroboros import AutoStagedModelForCausalLM, EngineError, OuroborosArguments, OuroborosTrainer


def held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_meta}


def make(rank: int, folder: str, saved: str) -> tuple[dict, dict, list[int], dict]:
    args = OuroborosArguments(**common_options(folder, num_stages=3))
    loaded = AutoStagedModelForCausalLM.from_pretrained(saved, args=args)
    set_seed(3)
    made = AutoStagedModelForCausalLM.from_config(loaded.config, args=args)
    values = held(loaded), held(made)
    trainer = OuroborosTrainer(model=made, args=args, train_dataset=Rows(18))
    with pytest.raises(EngineError, match="holds only its own stages of the GPT2LMHeadModel"):
        trainer.model.generate(torch.zeros(1, 3, dtype=torch.long))
    trainer.train()
    return *values, [row.parameters for row in trainer.stage_plan.rows], held(trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_unsplit_model(tmp_path: Path, tied: bool) -> None:
    tiny_model(tied, dropout=0.0).save_pretrained(tmp_path / "saved")
    parts = in_processes(2, make, str(tmp_path / "out"), str(tmp_path / "saved"))
    set_seed(3)
    config = tiny_model(tied, dropout=0.0).config
    fresh = AutoModelForCausalLM.from_config(config)
    for which, expected in enumerate([AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), fresh]):
        merged: dict[str, Any] = {n: p for part in parts for n, p in part[which].items()}
        assert differing({n: p.detach() for n, p in expected.named_parameters()}, merged) == []
        assert not parts[0][which].keys() & parts[1][which].keys()
    options = common_options(tmp_path / "here", num_stages=3, devices=["cpu:0", "cpu:1"])
    trainer = OuroborosTrainer(model=fresh, args=OuroborosArguments(**options), train_dataset=Rows(18))
    trainer.train()
    assert [row.parameters for row in trainer.stage_plan.rows] == parts[0][2]
    assert differing(held(fresh), {**parts[0][3], **parts[1][3]}) == []


def test_is_not_instantiated() -> None:
    with pytest.raises(TypeError, match=r"from_pretrained\(name, args=args\)"):
        AutoStagedModelForCausalLM()


def test_in_one_process_it_is_the_auto_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    args = OuroborosArguments(**common_options(tmp_path))
    model = AutoStagedModelForCausalLM.from_pretrained(tmp_path, args=args)
    assert differing(held(tiny_model()), held(model)) == []
    assert type(AutoStagedModelForCausalLM.from_config(model.config, args=args)) is type(model)
