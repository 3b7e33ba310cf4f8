"""Plans of runs with LoRA: what is frozen has no versions, gradients and optimizer state, and backwards cost half."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_cases import base, peft

from hf_ouroboros.cli import main
from hf_ouroboros.planning.hardware import parse_devices
from hf_ouroboros.planning.memory_model import MemoryOptions
from hf_ouroboros.planning.planner import estimated, plan_split
from hf_ouroboros.planning.unit_facts import model_facts


@pytest.mark.parametrize("case", ["lora on gpt2", "lora on llama"])
def test_memory_is_that_of_what_is_trained(case: str) -> None:
    config = base(case).config
    facts = model_facts(config, 2, 8, lora_rank=4)
    model = peft.get_peft_model(base(case), peft.LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert sum(unit.trained for unit in facts.units) == trained and not facts.tied
    kind = parse_devices(["rtx3090"])[0]
    plan = plan_split(facts, [estimated(facts, kind)] * 2, MemoryOptions(micro_batches=2))
    full = model_facts(config, 2, 8)
    whole = plan_split(full, [estimated(full, kind)] * 2, MemoryOptions(micro_batches=2), placement=plan.placement)
    assert len(plan.stages) == 2
    for stage in plan.stages:
        own = sum(unit.trained for unit in stage.units)
        new = 0 if stage.delay else own  # one tick late, they come while activations and the older version go
        assert (stage.memory.gradients, stage.memory.optimizer) == (new, 2 * own)
        assert stage.memory.versions == own * stage.delay
        assert stage.forward < stage.backward < 1.7 * stage.forward
    assert max(plan.bytes_on(d) for d in (0, 1)) < max(whole.bytes_on(d) for d in (0, 1))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base("lora on llama").config.save_pretrained(tmp_path)
    common = ["plan", str(tmp_path), "--seq", "8", "--output", str(tmp_path / "plan"), "--lora_rank", "4"]
    assert main([*common, "--devices", "2xrtx3090"]) == 0
    assert "only adapters are trained" in capsys.readouterr().out
    assert main([*common, "--devices", "cpu:0", "cpu:1"]) == 2
    assert "--lora_rank 4: devices of this machine" in capsys.readouterr().err
