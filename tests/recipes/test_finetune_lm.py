"""finetune_lm.py end to end: its own pairs, completions from a file, the hub, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import adapters
import finetune_lm
import pytest
from common import OptionError
from huggingface_hub import ModelCard
from loopback_hub import running_hub
from running import PLAIN_LOAD, recipe, run
from trainer_helpers import EVERY
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ouroboros.data import Document, default_corpus

TINY = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "sample_tokens": 8}


def write_pairs(path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_pairs_of_the_standard_library() -> None:
    text = 'def f(a, b=1):\n    """Return the sum of both.\n\n    More."""\n    return a + b\n\ndef g():\n    pass\n'
    assert finetune_lm.stdlib_pairs([Document("m.py", "def (:"), Document("n.py", text)], 5) == [
        {"prompt": 'def f: """', "completion": 'Return the sum of both."""'}
    ]
    corpus = default_corpus(4_000_000, 0.15)
    assert len(finetune_lm.stdlib_pairs(corpus.train, 480)) == 480
    assert len(finetune_lm.stdlib_pairs(corpus.validation, 60)) == 60


@pytest.mark.slow
@pytest.mark.skipif(
    not EVERY,
    reason="differs little from test_completions_of_a_file and the tests that push: HF_OUROBOROS_EVERY_CASE=1 runs it",
)
def test_own_pairs_pushed_to_the_hub(pretrained: tuple[Path, str], tmp_path: Path) -> None:
    values = TINY | {
        "model_name_or_path": pretrained[0],
        "max_train_examples": 24,
        "push_to_hub": True,
        "hub_model_id": "tester/tuned",
        "hub_strategy": "end",
    }
    with running_hub() as hub:
        done = recipe("finetune_lm.py", tmp_path, values, env=hub.env(tmp_path / "home"))
        files = hub.files("tester/tuned")
        assert "def f" in run(["-c", PLAIN_LOAD, "tester/tuned"], tmp_path, env=hub.env(tmp_path / "other")).stdout
    assert {"model.safetensors", "tokenizer.json", "README.md", "timeline.png"} <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert {"eval_loss", "eval_token_accuracy"} <= {result.metric_name for result in card.data.eval_results}
    assert "token accuracy" in done.stdout and ">>>" in done.stdout and "best checkpoint" in done.stdout


@pytest.mark.slow
def test_completions_of_a_file(pretrained: tuple[Path, str], tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    values = TINY | {
        "model_name_or_path": pretrained[0],
        "train_file": "pairs.jsonl",
        "validation_share": 0.25,
        "record_timeline": False,
    }
    done = recipe("finetune_lm.py", tmp_path, values)
    assert "18 training and 6 validation examples" in done.stdout
    state = json.loads((tmp_path / "runs/finetune_lm/trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert state["best_metric"] == min(losses.values())
    assert "24+" not in (tmp_path / "runs/finetune_lm/README.md").read_text()


@pytest.mark.slow
def test_lora(pretrained: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra `peft`")
    write_pairs(tmp_path / "pairs.jsonl")
    values = TINY | {"model_name_or_path": pretrained[0], "train_file": "pairs.jsonl", "num_train_epochs": 1}
    done = recipe("finetune_lm.py", tmp_path, values | {"lora_rank": 4, "record_timeline": False})
    assert "the others are frozen" in done.stdout and ">>>" in done.stdout
    names = {path.name for path in (tmp_path / "runs/finetune_lm").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    } <= names and "model.safetensors" not in names
    card = ModelCard((tmp_path / "runs/finetune_lm/README.md").read_text())
    assert card.data.library_name == "peft" and "PeftModel.from_pretrained" in card.text


def test_ranks() -> None:
    with pytest.raises(OptionError, match="lora_rank=0 must be at least 1"):
        adapters.with_lora(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)), 0)


@pytest.mark.slow
@pytest.mark.skipif(not EVERY, reason="differs little from test_lora: HF_OUROBOROS_EVERY_CASE=1 runs it")
def test_lora_on_packed_matrices(pretrained: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra `bnb`")
    values = TINY | {"model_name_or_path": pretrained[0], "max_train_examples": 8, "num_train_epochs": 1}
    done = recipe("finetune_lm.py", tmp_path, values | {"lora_rank": 4, "quantization": "nf4"})
    assert "the others are frozen" in done.stdout and ">>>" in done.stdout
    names = {path.name for path in (tmp_path / "runs/finetune_lm").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


def test_kinds_of_packing() -> None:
    assert adapters.packing(None, None, False) == {}
    for kind, rank, words in (
        ("gptq", 4, "must be nf4 or int8"),
        ("nf4", None, "packed matrices can't be trained; add lora_rank"),
    ):
        with pytest.raises(OptionError, match=words):
            adapters.packing(kind, rank, False)
    pytest.importorskip("bitsandbytes", reason="needs the extra `bnb`")
    for kind, bits in (("nf4", "load_in_4bit"), ("int8", "load_in_8bit")):
        assert getattr(adapters.packing(kind, 4, True)["quantization_config"], bits)


@pytest.mark.slow
def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    assert "run recipes/pretrain_lm.py first" in recipe("finetune_lm.py", tmp_path, fails=True).stderr
