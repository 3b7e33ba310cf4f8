"""pretrain_lm.py end to end: what it writes and prints, its data, its errors, and an interrupted run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pretrain_lm
import pytest
from common import run_recipe
from huggingface_hub import ModelCard
from running import PLAIN_LOAD, RECIPES, TINY, options, recipe, run
from safetensors.torch import load_file

from hf_ouroboros.data import byte_tokenizer


@pytest.mark.slow
def test_files_card_and_table(pretrained: tuple[Path, str], tmp_path: Path) -> None:
    out, printed = pretrained
    assert {"model.safetensors", "tokenizer.json", "README.md", "timeline.png", "sample.txt"} <= {
        path.name for path in out.iterdir()
    }
    assert "def f" in run(["-c", PLAIN_LOAD, str(out)], tmp_path).stdout
    events = json.loads((out / "timeline.json").read_text())["traceEvents"]
    assert {row["tid"] for row in events if row["ph"] == "X"} == {0, 1}

    card = ModelCard.load(out / "README.md")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    # 20,000 bytes of ASCII in documents: tokens are bytes and a few separators.
    assert results["eval_bits_per_byte"] == pytest.approx(results["eval_loss"] / math.log(2), rel=0.02)
    assert 3.5 < results["unigram_bits_per_byte"] < 6.0
    assert "standard library" in card.text and "timeline.png" in card.text
    for row in ("validation loss", "bits per character", "by token frequency", "tokens per second", "cpu:1 busy"):
        assert row in printed
    assert "4 updates, 2,048 tokens" in printed  # 4 updates of 4 micro-batches of 4 blocks of 32
    shown = float(re.search(r"validation loss \(nats per token\)\s+([\d.]+)", printed)[1])
    assert shown == pytest.approx(results["eval_loss"], abs=1e-4)


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = TINY | {"save_strategy": "steps", "save_steps": 2, "sample_tokens": 0, "record_timeline": False}
    recipe("pretrain_lm.py", tmp_path, settings | {"output_dir": "whole"})
    resume = {"output_dir": "resumed", "resume_from_checkpoint": "whole/checkpoint-2"}
    recipe("pretrain_lm.py", tmp_path, settings | resume)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)
    halfway = load_file(tmp_path / "whole/checkpoint-2/model.safetensors")
    assert not all(whole[name].equal(halfway[name]) for name in whole)


@pytest.mark.slow
def test_another_decoder_is_pretrained_and_finetuned(tmp_path: Path) -> None:
    overrides = "hidden_size=32,intermediate_size=64,num_hidden_layers=3,num_attention_heads=2,num_key_value_heads=1"
    values = TINY | {"model_type": "qwen3", "config_overrides": overrides, "output_dir": "out", "max_steps": 2}
    recipe("pretrain_lm.py", tmp_path, values)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["vocab_size"]) == ("qwen3", 32, 257)
    tuning = {"model_name_or_path": "out", "max_train_examples": 8, "num_train_epochs": 1, "sample_tokens": 8}
    done = recipe("finetune_lm.py", tmp_path, tuning)
    assert "before -> after" in done.stdout
    assert "This `qwen3` causal language model" in (tmp_path / "runs/finetune_lm/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model_type": "gpt2"}, {"n_embd": 96, "n_layer": 6, "n_positions": 64, "resid_pdrop": 0.0}),
        ({"model_type": "gpt2", "config_overrides": "n_positions=128"}, {"n_embd": 768, "n_positions": 128}),
        ({"model_type": "gpt2", "smoke": True}, {"n_embd": 32, "n_layer": 4}),
        ({"model_type": "deepseek_v3"}, {"hidden_size": 96, "num_hidden_layers": 6, "n_routed_experts": 8}),
        ({"model_type": "qwen3", "smoke": True}, {"hidden_size": 32, "max_position_embeddings": 64}),
        ({"model_type": "llama", "config_overrides": "num_hidden_layers=2"}, {"hidden_size": 4096}),
    ],
)
def test_models_from_scratch_are_small_or_as_told(options: dict[str, Any], expected: dict[str, object]) -> None:
    config = pretrain_lm.make_config(pretrain_lm.ScriptArguments(**options), byte_tokenizer(64))
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.vocab_size, config.eos_token_id) == (257, 256)


@pytest.mark.slow
def test_text_file_config_and_checkpoint_under_accelerate(pretrained: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Die Schlange beißt sich in den Schwanz.\n" * 200, encoding="utf-8")
    (tmp_path / "c.yaml").write_text(f"train_file: [text.txt]\nmodel_name_or_path: {pretrained[0]}\nmax_steps: 9\n")
    values = {"config": "c.yaml", "max_steps": 2, "block_size": 32, "prompt": "Die ", "sample_tokens": 8}
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = run([*launch, str(RECIPES / "pretrain_lm.py"), *options(values)], tmp_path)
    assert "runs/pretrain_lm: 2 updates" in done.stdout
    assert "text.txt" in (tmp_path / "runs/pretrain_lm/README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_errors_come_before_any_work(tmp_path: Path) -> None:
    done = recipe("pretrain_lm.py", tmp_path, {"config_overrides": "n_layers=3"}, fails=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "OptionError" in last and "config_overrides" in last
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_missing_text_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pretrain_lm.py", *options({"train_file": "missing.txt"})])
    with pytest.raises(SystemExit, match="2"):
        run_recipe(pretrain_lm.main)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "DataFileNotFoundError" in last and "missing.txt" in last
    assert not (tmp_path / "runs").exists()
