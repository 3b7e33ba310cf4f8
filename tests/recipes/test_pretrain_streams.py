"""pretrain_lm.py on streams: the paper's configurations at smoke size, memories, prepared data, words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import evaluate_lm
import pretrain_lm
import pytest
from common import OptionError, parse_options
from lm_data import make_examples, make_tokenizer, read_source
from running import RECIPES
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ouroboros.data import PackedBlocks, StreamSegments, byte_tokenizer, text_stream
from hf_ouroboros.data.prepared import PreparedSplit, PreparedStreams, count_units

PAPER = sorted(path.stem for path in (RECIPES / "configs").glob("*_trans*.yaml"))
FAST = ["--max_steps", "2", "--sample_tokens", "0", "--record_timeline", "false", "--disable_tqdm", "true"]


def pretrain(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: object) -> dict[str, float]:
    """Runs the recipe in a folder; the last evaluation of the run."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["pretrain_lm.py", *map(str, options)])
    pretrain_lm.main()
    state = json.loads((folder / "runs/smoke/trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "eval_loss" in entry][-1]


def test_all_of_the_papers_experiments_are_there() -> None:
    data, models = ("enwik8", "text8", "wikitext103"), ("transfo_xl", "transformer")
    assert PAPER == [f"{corpus}_{model}" for corpus in data for model in models]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_every_experiment_has_a_smoke_size(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(monkeypatch, tmp_path, "--config", RECIPES / f"configs/{name}.yaml", "--smoke", *FAST)
    assert f"smoke test: there is no data/{name.partition('_')[0]}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/smoke")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs/smoke")
    assert model.config.model_type == ("transfo-xl" if "transfo_xl" in name else "gpt2")
    assert len(tokenizer) == model.config.vocab_size and (len(tokenizer) > 257) == ("wikitext" in name)
    assert len(getattr(model.config, "cutoffs", [])) == (3 if name == "wikitext103_transfo_xl" else 0)


@pytest.mark.parametrize("model_type", ["gpt2", "transfo-xl"])
def test_trainer_and_evaluate_lm_agree_on_prepared_streams(
    model_type: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"train": "Der Schwanz der Schlange.\n" * 60, "validation": "Die Schlange beißt.\n" * 10}
    splits = {
        name: PreparedSplit(text_stream([text], byte_tokenizer()), count_units([text])) for name, text in texts.items()
    }
    PreparedStreams("Snakes.", splits).save(tmp_path / "data/snakes", byte_tokenizer())
    # One column, as evaluate_lm.py reads by default: 209 targets, the last segment has 17.
    options = ["--smoke", "--model_type", model_type, "--data_dir", "data/snakes", "--per_device_eval_batch_size", 1]
    if model_type == "transfo-xl":
        options += ["--eval_mem_len", 48]  # longer than in training
    trained = pretrain(monkeypatch, tmp_path, *options, *FAST)
    assert "Snakes." in capsys.readouterr().out

    command = ["--model_name_or_path", "runs/smoke", "--data_dir", "data/snakes", "--segment_len", "32"]
    if model_type == "transfo-xl":
        command += ["--mem_len", "48"]
    monkeypatch.setattr(sys, "argv", ["evaluate_lm.py", *command, "--device", "cpu"])
    evaluate_lm.main()
    found = json.loads((tmp_path / "runs/smoke/evaluation.json").read_text())
    assert found["targets"] == 209 == len(texts["validation"].encode()) - 1
    # The trainer adds up means of batches in float32.
    assert found["loss"] == pytest.approx(trained["eval_loss"], rel=1e-6)


def examples(*options: object, has_memory: bool = False):
    """What the options read, and the trainer's arguments."""
    arguments = ["--max_train_bytes", "40000", "--use_cpu", "true", *map(str, options)]
    script, args = parse_options(pretrain_lm.ScriptArguments, pretrain_lm.DEFAULTS, arguments, pretrain_lm.SMOKE)
    source = read_source(script)
    return make_examples(script, args, source, make_tokenizer(script, source), has_memory), args


def test_blocks_or_columns() -> None:
    data, args = examples()
    assert isinstance(data.train, PackedBlocks) and args.train_sampling_strategy == "random"
    data, args = examples(has_memory=True)  # micro-batches split the columns of an update
    assert isinstance(data.train, StreamSegments) and data.train.columns == 16 and data.train.segment_length == 64
    assert args.train_sampling_strategy == "sequential" and args.dataloader_drop_last
    assert data.validation.num_targets == len(data.validation.tokens) - 1 and data.validation.columns == 32
    assert "stream_columns" in data.collator([data.train[0]])
    data, _ = examples("--columns", 4, "--eval_segment_len", 16)  # an update reads consecutive segments
    assert data.train.columns == 4 and data.validation.segment_length == 16
    assert "stream_columns" not in data.collator([data.train[0]])


def test_data_that_cannot_be_meant_is_named() -> None:
    with pytest.raises(OptionError, match="data_dir is a corpus by itself"):
        examples("--data_dir", "data", "--train_file", "text.txt")
