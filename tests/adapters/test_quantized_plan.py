"""Plans of LoRA on packed matrices: memory is that of what is packed, and an 8B model fits two devices of 12 GB."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_cases import base, peft
from quantized_cases import packed
from transformers import LlamaConfig

from hf_ouroboros import DeviceMapError
from hf_ouroboros.cli import main
from hf_ouroboros.partition.packed import sizes
from hf_ouroboros.planning.hardware import parse_devices
from hf_ouroboros.planning.memory_model import MemoryOptions
from hf_ouroboros.planning.planner import SplitPlan, estimated, plan_split
from hf_ouroboros.planning.unit_facts import model_facts


@pytest.mark.parametrize("case", ["lora on gpt2", "lora on llama"])
@pytest.mark.parametrize(("quantization", "kind"), [("nf4", "double"), ("int8", "int8")])
def test_memory_is_that_of_the_packed_model(case: str, quantization: str, kind: str, tmp_path: Path) -> None:
    facts = model_facts(base(case).config, 2, 8, lora_rank=4, quantization=quantization)
    model = packed(case, kind, tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    real = sizes(model.parameters(), model)
    # A frozen tied matrix is on both devices.
    tied = model.get_input_embeddings().weight if model.config.tie_word_embeddings else None
    twice = 0 if tied is None else real[id(tied)].bytes
    assert sum(unit.parameter_bytes for unit in facts.units) == sum(size.bytes for size in real.values()) + twice
    plain = model_facts(base(case).config, 2, 8, lora_rank=4)
    for unit, before in zip(facts.units, plain.units, strict=True):
        assert (unit.parameters, unit.flops, unit.trained) == (before.parameters, before.flops, before.trained)
        assert (unit.parameter_bytes < before.parameter_bytes) == (unit.kind == "layer")
        assert bool(unit.unpacked_bytes) == (unit.kind == "layer") and unit.largest_unpacked <= unit.unpacked_bytes
    device = parse_devices(["rtx3090"])[0]
    layer, before = facts.units[1], plain.units[1]
    assert device.forward_seconds(layer, facts.dtype) > device.forward_seconds(before, facts.dtype)


@pytest.mark.slow
def test_eight_billion_parameters_on_two_devices_of_12_gb() -> None:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )

    def planned(quantization: str | None) -> SplitPlan:
        facts = model_facts(config, 1, 1024, config.dtype, lora_rank=16, quantization=quantization)
        kind = parse_devices(["35tflops/12gb"])[0]
        return plan_split(facts, [estimated(facts, kind)] * 2, MemoryOptions(micro_batches=8, recompute=True))

    with pytest.raises(DeviceMapError, match="does not fit into 2 devices"):
        planned(None)
    needs = {}
    for quantization in ("nf4", "int8"):
        plan = planned(quantization)
        needs[quantization] = [plan.bytes_on(device) / 2**30 for device in (0, 1)]
        assert all(stage.delay == 1 - stage.stage for stage in plan.stages)
    assert needs["nf4"] == pytest.approx([6.9, 8.5], abs=0.1)
    assert needs["int8"] == pytest.approx([8.3, 10.3], abs=0.1)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base("lora on llama").config.save_pretrained(tmp_path)
    common = ["plan", str(tmp_path), "--seq", "8", "--output", str(tmp_path / "plan"), "--quantization", "nf4"]
    assert main([*common, "--devices", "2xrtx3090", "--lora_rank", "4"]) == 0
    assert "matrices are packed: all weights are 0.00 GiB" in capsys.readouterr().out
    assert main([*common, "--devices", "2xrtx3090"]) == 2
    assert "--quantization nf4: packed matrices can't be trained" in capsys.readouterr().err
