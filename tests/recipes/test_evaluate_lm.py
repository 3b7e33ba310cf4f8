"""evaluate_lm.py: what it reads, how, and what it writes and prints."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import evaluate_lm
import pytest
from common import OptionError
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, set_seed

from hf_ouroboros.data import byte_tokenizer, text_stream
from hf_ouroboros.data.prepared import PreparedSplit, PreparedStreams, count_units
from hf_ouroboros.metrics.stream_loss import stream_loss
from hf_ouroboros.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel

TEXT = "Die Schlange beißt sich in den Schwanz.\n" * 5


def saved(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model.eval()


@pytest.fixture
def gpt2(tmp_path: Path) -> GPT2LMHeadModel:
    set_seed(0)
    size = {"vocab_size": 257, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return saved(GPT2LMHeadModel(GPT2Config(**size, bos_token_id=256, eos_token_id=256)), tmp_path / "gpt2")


@pytest.fixture
def transfo_xl(tmp_path: Path) -> TransfoXLLMHeadModel:
    set_seed(0)
    size = {"d_model": 16, "d_embed": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "n_layer": 2, "div_val": 1}
    config = TransfoXLConfig(vocab_size=257, cutoffs=[], mem_len=8, init_std=0.3, eos_token_id=256, **size)
    return saved(TransfoXLLMHeadModel(config), tmp_path / "xl")


def evaluate(monkeypatch: pytest.MonkeyPatch, folder: Path, **options: object) -> dict:
    """Runs the recipe in a folder that has the text; its results."""
    monkeypatch.chdir(folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    options = {"text_file": "text.txt", "device": "cpu"} | options
    command = [f"--{name}={value}" for name, value in options.items() if value is not None]
    monkeypatch.setattr(sys, "argv", ["evaluate_lm.py", *command])
    evaluate_lm.main()
    return json.loads((folder / str(options["model_name_or_path"]) / "evaluation.json").read_text())


def test_sliding_window(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpt2: GPT2LMHeadModel, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = text_stream([TEXT], byte_tokenizer())
    plain = evaluate(monkeypatch, tmp_path, model_name_or_path="gpt2")
    assert plain["loss"] == stream_loss(gpt2, tokens, 24).metrics(count_units([TEXT]))["loss"]
    assert plain["targets"] == len(TEXT.encode()) - 1 and plain["segment_len"] == 24
    assert plain["bits_per_byte"] == pytest.approx(plain["loss"] / math.log(2))  # a token is a byte
    assert plain["bits_per_character"] == pytest.approx(plain["bits_per_byte"] * len(TEXT.encode()) / len(TEXT))
    printed = capsys.readouterr().out
    assert f"{plain['bits_per_byte']:.4f}" in printed and f"{plain['perplexity']:,.3f}" in printed
    window = evaluate(monkeypatch, tmp_path, model_name_or_path="gpt2", mem_len=16)
    assert window["segment_len"] == 8 and window["mem_len"] == 16
    assert window["loss"] == stream_loss(gpt2, tokens, 8, overlap=16).metrics(count_units([TEXT]))["loss"]


def test_memory_is_as_long_as_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, transfo_xl: TransfoXLLMHeadModel
) -> None:
    tokens = text_stream([TEXT], byte_tokenizer())
    own = evaluate(monkeypatch, tmp_path, model_name_or_path="xl")
    assert own["loss"] == stream_loss(transfo_xl, tokens, 8).metrics(count_units([TEXT]))["loss"]
    options = {"segment_len": 10, "mem_len": 30, "clamp_len": 12, "same_length": "false", "columns": 2}
    longer = evaluate(monkeypatch, tmp_path, model_name_or_path="xl", **options)
    for name in ("mem_len", "clamp_len"):
        setattr(transfo_xl.config, name, options[name])
    transfo_xl.config.same_length = False
    expected = stream_loss(transfo_xl, tokens, 10, columns=2)
    assert longer["loss"] == expected.metrics(count_units([TEXT]))["loss"] != own["loss"]
    assert (longer["mem_len"], longer["clamp_len"], longer["same_length"]) == (30, 12, False)


def test_prepared_streams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpt2: GPT2LMHeadModel) -> None:
    split = PreparedSplit(text_stream([TEXT], byte_tokenizer()), count_units([TEXT]))
    PreparedStreams("Snakes.", {"test": split}).save(tmp_path / "data", byte_tokenizer())
    from_text = evaluate(monkeypatch, tmp_path, model_name_or_path="gpt2")
    options = {"text_file": None, "data_dir": "data", "split": "test"}
    found = evaluate(monkeypatch, tmp_path, model_name_or_path="gpt2", **options)
    assert found | {"data": ""} == from_text | {"data": ""} and found["data"] == "test part of Snakes."
    other = byte_tokenizer()
    other.add_tokens(["snake"])
    other.save_pretrained(tmp_path / "data")
    with pytest.raises(OptionError, match="another vocabulary"):
        evaluate(monkeypatch, tmp_path, model_name_or_path="gpt2", **options)


def test_what_does_not_fit_the_model_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpt2: GPT2LMHeadModel
) -> None:
    for options, message in (
        ({"clamp_len": 3}, "clamp_len: a gpt2 has no memory"),
        ({"mem_len": 20, "segment_len": 5}, "mem_len=20 and segment_len=5 must fit into the model's 24 positions"),
        ({"mem_len": 24}, "must fit into the model's 24 positions"),
        ({"data_dir": "x"}, "data_dir or text_file"),
        ({"text_file": "none.txt"}, "no file at none.txt"),
    ):
        with pytest.raises(OptionError, match=message):
            evaluate(monkeypatch, tmp_path, model_name_or_path="gpt2", **options)
