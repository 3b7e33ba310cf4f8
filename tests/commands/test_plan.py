"""`hf-ouroboros plan`: from a configuration to a table, a device map that training takes, and a picture."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
from decoders import tiny
from helpers import tiny_gpt2
from transformers import AutoModelForCausalLM

from hf_ouroboros.cli import main
from hf_ouroboros.commands.options import load_config
from hf_ouroboros.partition import split_model

SHAPE = ["--batch", "2", "--seq", "8", "--micro_batches", "4"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    tiny_gpt2().config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_plan_and_train_with_it(config: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "plans" / "mine"
    assert main(["plan", config, "--devices", "t4", "rtx3090", *SHAPE, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "5 layers, tied embeddings; micro-batches of 2 x 8 tokens, float32, M = 4, adamw" in text
    assert "the first stage's gradients are 0.5 updates late\n" in text
    for word in (
        "delay",
        "0: t4",
        "1: rtx3090",
        "old versions",
        "pipelined",
        "lockstep",
        "1f1b",
        "naive",
        "zero-bubble",
    ):
        assert word in text
    file = output.with_name("mine.json")
    assert f"--device_map {file}" in text
    split = split_model(tiny_gpt2(), ["cpu:0", "cpu:1"], str(file))
    assert split.plan.placement == (0, 1, 0)
    assert {str(d) for d in json.loads(file.read_text()).values()} == {"0", "1"}
    assert output.with_name("mine.png").read_bytes()[:4] == b"\x89PNG"


def test_measured_devices(config: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("hf_ouroboros.partition.measure.CACHE", tmp_path / "cache")
    arguments = ["plan", config, "--devices", "cpu:0", "cpu:1", *SHAPE, "--output", str(tmp_path / "plan")]
    assert main(arguments) == 0
    assert "0: cpu:0" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--micro_batches", "3"], "0.67 updates late; M = 4 or more is recommended"),
        (["--micro_batches", "3", "--schedule", "1f1b"], "no gradient is late"),
    ],
)
def test_delay_is_told(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], told: str
) -> None:
    where = ["--devices", "t4", "t4", "--output", str(tmp_path / "p")]
    assert main(["plan", config, *where, *SHAPE, *arguments]) == 0
    assert told in capsys.readouterr().out


def test_planned_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny("gpt2", num_hidden_layers=6, add_cross_attention=True).save_pretrained(tmp_path)
    arguments = [str(tmp_path / "config.json"), "--devices", "3x10tflops/8gb", *SHAPE, "--output", str(tmp_path / "p")]
    assert main(["plan", *arguments, "--dtype", "bfloat16", "--recompute"]) == 0
    text = capsys.readouterr().out
    assert "PLANNED ONLY, training not supported: GPT2LMHeadModel with config.add_cross_attention=True can't" in text
    assert "bfloat16, M = 4, adamw, recompute" in text
    assert "for --device_map" not in text


def test_a_mixture_is_planned_and_split_as_planned(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tiny("deepseek_v3", num_hidden_layers=5)
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    output = tmp_path / "p"
    arguments = [str(tmp_path), "--devices", "2x10tflops/8gb", "--num_stages", "2", *SHAPE, "--output", str(output)]
    assert main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    unused = 4 * 2 * 3 * 32 * 16
    assert f"{model.num_parameters():,} parameters ({model.num_parameters() - unused:,} per token), 5 layers" in text
    assert "PLANNED ONLY" not in text
    split = split_model(model, ["cpu:0", "cpu:1"], str(output.with_name("p.json")))
    assert split.plan.placement == (0, 1)


def test_options_that_follow_from_changed_ones() -> None:
    changes = "hidden_size=256,num_attention_heads=4,rope_parameters={rope_type: default, rope_theta: 5000.0}"
    found = load_config(Namespace(model="llama", config_overrides=changes))
    assert (found.head_dim, found.num_key_value_heads, found.rope_parameters["rope_theta"]) == (64, 4, 5000.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody/nothing", "--devices", "t4"], "no configuration for 'nobody/nothing'"),
        (["gpt2", "--devices", "abacus"], "--devices 'abacus' is unknown"),
        (["gpt2", "--devices", "t4", "cpu:0"], "mixes devices of this machine"),
        (["gpt2", "--devices", "t4", "--config_overrides", "layers=3"], "write name=value with a name that a gpt2"),
        (["gpt2", "--devices", "t4", "--link", "0"], "bandwidth=0"),
        (["gpt2", "--batch", "4", "--devices", "2x1tflops/4gb"], "does not fit into 2 devices .* It would fit with"),
    ],
    ids=str,
)
def test_errors(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *arguments, "--output", str(tmp_path / "plan")]) == 1
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
