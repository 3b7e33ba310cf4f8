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
        "zb-h1",
    ):
        assert word in text
    file = output.with_name("mine.json")
    assert f"--device_map {file}" in text
    split = split_model(tiny_gpt2(), ["cpu:0", "cpu:1"], str(file))
    assert split.plan.placement == (0, 1, 0)
    assert {str(d) for d in json.loads(file.read_text()).values()} == {"0", "1"}
    assert output.with_name("mine.png").read_bytes()[:4] == b"\x89PNG"


def test_measured_devices(config: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("hf_ouroboros.planning.measure.CACHE", tmp_path / "cache")
    arguments = ["plan", config, "--devices", "cpu:0", "cpu:1", *SHAPE, "--output", str(tmp_path / "plan")]
    assert main(arguments) == 0
    assert "0: cpu:0" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--micro_batches", "3"], "0.67 updates late; M = 4 or more is recommended"),
        (["--micro_batches", "3", "--schedule", "1f1b"], "no gradient is late"),
        (["--weights", "now"], "M = 4, adamw, weights of now"),
    ],
)
def test_delay_is_told(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], told: str
) -> None:
    where = ["--devices", "t4", "t4", "--output", str(tmp_path / "p")]
    assert main(["plan", config, *where, *SHAPE, *arguments]) == 0
    assert told in capsys.readouterr().out


def test_autocast(config: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    where = ["--devices", "t4", "t4", "--output", str(tmp_path / "p")]
    assert main(["plan", config, *where, *SHAPE, "--bf16"]) == 0
    assert "float32, autocast, M = 4" in capsys.readouterr().out
    assert main(["plan", config, *where, *SHAPE, "--bf16", "--dtype", "bfloat16"]) == 2
    assert "--bf16 with weights in bfloat16: autocast computes" in capsys.readouterr().err
    where[1:3] = ["cpu:0", "cpu:1"]
    assert main(["plan", config, *where, *SHAPE, "--bf16"]) == 2
    assert "--bf16: devices of this machine are measured without autocast" in capsys.readouterr().err


def test_planned_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny("gpt2", num_hidden_layers=6, layerdrop=0.1).save_pretrained(tmp_path)
    arguments = [str(tmp_path / "config.json"), "--devices", "3x10tflops/8gb", *SHAPE, "--output", str(tmp_path / "p")]
    assert main(["plan", *arguments, "--dtype", "bfloat16", "--recompute"]) == 0
    text = capsys.readouterr().out
    assert "PLANNED ONLY, training not supported: layerdrop=0.1: layers that are skipped at random" in text
    assert "bfloat16, M = 4, adamw, recompute" in text
    assert "for --device_map" not in text


@pytest.mark.slow
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
    ("status", "arguments", "message"),
    [
        (1, ["nobody/nothing", "--devices", "t4"], "no configuration for 'nobody/nothing'"),
        (2, ["gpt2", "--devices", "abacus"], "--devices 'abacus' is unknown"),
        (2, ["gpt2", "--devices", "t4", "cpu:0"], "mixes devices of this machine"),
        (2, ["gpt2", "--devices", "cpu:0", "cpu:0"], "must be different devices"),
        (
            2,
            ["gpt2", "--devices", "t4", "--weights", "now", "--schedule", "1f1b"],
            "no backward is late, and no older weights",
        ),
        (2, ["gpt2", "--devices", "cuda:99"], "names 'cuda:99', which this machine doesn't have"),
        (2, ["gpt2", "--devices", "t4", "--config_overrides", "layers=3"], "with a name that a gpt2 configuration has"),
        (2, ["gpt2", "--devices", "t4", "--config_overrides", "n_layer=many"], "n_layer must be int, got 'many'"),
        (
            1,
            ["gpt2", "--devices", "t4", "--config_overrides", "n_layer=1000000000"],
            "n_layer=1000000000 is more than 1,024",
        ),
        (
            1,
            ["gpt2", "--devices", "t4", "--config_overrides", "n_head=0"],
            "no gpt2 model can be made of this configuration",
        ),
        (1, ["gpt2", "--devices", "t4", "--config_overrides", "n_layer=0"], "has no layers in this configuration"),
        (
            1,
            ["gpt2", "--devices", "t4", "--config_overrides", "dtype=int8"],
            "dtype=torch.int8 is no floating-point type",
        ),
        (1, ["gpt2", "--batch", "4", "--devices", "2x1tflops/4gb"], "does not fit into 2 devices .* It would fit with"),
        (2, ["gpt2", "--devices", "t4", "--micro_batches", "60000"], "take too long to simulate"),
    ],
    ids=str,
)
def test_errors(status: int, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *arguments, "--output", str(tmp_path / "plan")]) == status
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model_type": 3}',
        b'{"model_type": "gpt2", "n_layer": "x"}',
    ],
)
def test_malformed_configurations(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_bytes(content)
    for name in (tmp_path, tmp_path / "config.json"):
        assert main(["plan", str(name), "--devices", "t4", *SHAPE, "--output", str(tmp_path / "plan")]) == 1
        assert "error: " in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_more_devices_than_layers(config: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", config, "--devices", "16xt4", *SHAPE, "--output", str(tmp_path / "plan")]) == 0
    text = capsys.readouterr().out
    assert "only 5 of 16 devices are used: more have no layers of their own" in text
    assert "naive: not simulated" in text
    assert re.search(r"pipelined +[0-9,]+ +- ", text)


@pytest.mark.parametrize("blocked", ["plan.json", "plan.png"])
def test_both_files_or_none(config: str, blocked: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "out" / "plan"
    (tmp_path / "out" / blocked).mkdir(parents=True)
    arguments = ["plan", config, "--devices", "t4", *SHAPE, "--output"]
    assert main([*arguments, str(output)]) == 1
    told = capsys.readouterr()
    assert f"{blocked}' is a folder" in told.err and told.out == "", "found out before the work"
    assert [p.name for p in output.parent.iterdir()] == [blocked]
    assert main([*arguments, str(tmp_path / "model" / "config.json" / "plan")]) == 1
    assert "is a file, not a folder" in capsys.readouterr().err


def test_a_picture_that_fails_leaves_no_map(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_ouroboros.commands.plan._picture", full)
    assert main(["plan", config, "--devices", "t4", *SHAPE, "--output", str(tmp_path / "new" / "deep" / "plan")]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
