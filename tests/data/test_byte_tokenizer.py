from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hf_ouroboros.data import BYTE_VOCAB_SIZE, END_OF_TEXT, byte_tokenizer

TOKENIZER = byte_tokenizer()
SAMPLES = [
    "",
    " ",
    "\n\r\n\t \n",
    " a , b .",
    "naïve 東京 🐍👩‍👩‍👧",
    "\x00\x7f\u2028\ufeff",
    "don't  stop",
    f"a{END_OF_TEXT}b",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip_of_awkward_texts(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@pytest.mark.slow
@given(st.text())
@settings(deadline=None)
def test_ids_are_the_bytes_and_decode_to_the_text(text: str) -> None:
    ids = TOKENIZER(text, split_special_tokens=True)["input_ids"]
    assert bytes(ids) == text.encode()
    assert TOKENIZER.decode(ids) == text


def test_every_byte_has_an_id_and_a_character_of_its_own() -> None:
    tokens = TOKENIZER.convert_ids_to_tokens(range(256))
    assert len(set(tokens)) == 256
    assert TOKENIZER.convert_tokens_to_ids(tokens) == list(range(256))
    assert len(TOKENIZER) == TOKENIZER.vocab_size == BYTE_VOCAB_SIZE == 257


def test_special_token_is_one_id_plays_all_parts_and_is_never_added() -> None:
    assert isinstance(TOKENIZER, PreTrainedTokenizerFast)
    assert {
        TOKENIZER.bos_token_id,
        TOKENIZER.eos_token_id,
        TOKENIZER.pad_token_id,
        TOKENIZER.unk_token_id,
    } == {256}
    assert TOKENIZER("a")["input_ids"] == [97]
    assert TOKENIZER(f"a{END_OF_TEXT}")["input_ids"] == [97, 256]
    assert TOKENIZER.decode([97, 256], skip_special_tokens=True) == "a"
    assert TOKENIZER(END_OF_TEXT, split_special_tokens=True)["input_ids"] == list(END_OF_TEXT.encode())


def test_pads_and_truncates_like_any_tokenizer() -> None:
    tokenizer = byte_tokenizer(model_max_length=3)
    assert tokenizer.model_max_length == 3
    batch = tokenizer(["abcdef", "x"], truncation=True, padding=True)
    assert batch["input_ids"] == [[97, 98, 99], [120, 256, 256]]
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.slow
def test_saved_copy_loads_without_this_package(tmp_path: Path) -> None:
    """Also next to the configuration of a GPT-2 model, whose own tokenizer class must not take over."""
    byte_tokenizer(model_max_length=77).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 257}))
    code = """
import json, sys
from transformers import AutoTokenizer
texts = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(name.startswith("hf_ouroboros") for name in sys.modules)
ids = tokenizer(texts)["input_ids"]
print(json.dumps([tokenizer.model_max_length, tokenizer.eos_token_id, ids, tokenizer.batch_decode(ids)]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        input=json.dumps(SAMPLES),
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == [77, 256, TOKENIZER(SAMPLES)["input_ids"], SAMPLES]
