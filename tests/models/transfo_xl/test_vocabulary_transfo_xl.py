"""Old vocabularies to fast tokenizers with the same ids."""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hf_ouroboros.models.transfo_xl.errors import ConversionError
from hf_ouroboros.models.transfo_xl.vocabulary import Vocabulary, build_tokenizer, read_vocabulary

WORDS = ["<eos>", "the", ",", "<unk>", "@-@", "Straße", "."]


def attributes(words: list[str] = WORDS, **others: Any) -> dict[str, Any]:
    ids = OrderedDict((word, i) for i, word in enumerate(words))
    return {"counter": Counter(words), "special": ["<eos>"], "idx2sym": words, "sym2idx": ids, **others}


def write(content: Any, path: Path) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def test_all_formats(tmp_path: Path) -> None:
    torch.save(attributes(lower_case=True), tmp_path / "vocab.bin")
    torch.save(attributes(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "vocab.txt").write_text("".join(f"{word} 17\n" for word in WORDS), encoding="utf-8")
    assert read_vocabulary(write(attributes(), tmp_path / "vocab.pkl")) == Vocabulary(WORDS)
    assert read_vocabulary(tmp_path / "vocab.bin") == Vocabulary(WORDS, lower_case=True)
    assert read_vocabulary(tmp_path / "old.bin") == Vocabulary(WORDS)
    assert read_vocabulary(tmp_path / "vocab.txt") == Vocabulary(WORDS)


def test_ids_are_those_of_the_old_vocabulary(tmp_path: Path) -> None:
    build_tokenizer(Vocabulary(WORDS)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast and len(tokenizer) == len(WORDS)
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(WORDS)}
    assert tokenizer("the Straße , cat @-@ .").input_ids == [1, 5, 2, 3, 4, 6, 0]
    assert tokenizer("the\tthe\n", add_special_tokens=False).input_ids == [1, 1]
    assert tokenizer("the <eos> .", add_special_tokens=False).input_ids == [1, 0, 6]
    assert tokenizer.decode([1, 5, 6]) == "the Straße ."
    assert tokenizer.decode([1, 0], skip_special_tokens=True) == "the"
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 3)
    assert not list(tmp_path.glob("*.pkl")) and (tmp_path / "tokenizer.json").exists()


def test_variants() -> None:
    assert build_tokenizer(Vocabulary(WORDS), add_eos=False)("the").input_ids == [1]
    assert build_tokenizer(Vocabulary(["the", "<UNK>"]))("The the").input_ids == [1, 0]
    assert build_tokenizer(Vocabulary(["the", "<UNK>"], lower_case=True))("The").input_ids == [0]
    pair = build_tokenizer(Vocabulary(WORDS))("the", ".")
    assert pair.input_ids == [1, 0, 6, 0]
    # A vocabulary without a word for unknown words (enwik8) doesn't drop them in silence.
    with pytest.raises(Exception, match="(?i)unk"):
        build_tokenizer(Vocabulary(["97", "98"]))("99")
    with pytest.raises(ConversionError, match="no <eos>"):
        build_tokenizer(Vocabulary(["97"]), add_eos=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"idx2sym": ["a"]}, "no list idx2sym and dict sym2idx"),
        ([1, 2], "no Transformer-XL vocabulary"),
        ({"idx2sym": ["a", 3], "sym2idx": {"a": 0, 3: 1}}, r"idx2sym\[1\] is 3, not a word"),
        ({"idx2sym": ["a", "b"], "sym2idx": {"a": 0, "b": 0}}, r"idx2sym\[1\] is 'b', but sym2idx has 0 for it"),
        ({"idx2sym": ["a"], "sym2idx": {"a": 0, "b": 1}}, "sym2idx has 2 words, idx2sym 1"),
        ({"idx2sym": [], "sym2idx": {}}, "holds no words"),
        (attributes(delimiter=","), "only vocabularies for text that is split at whitespace"),
    ],
)
def test_contradictions_are_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=message):
        read_vocabulary(write(content, tmp_path / "vocab.pkl"))


def test_words_must_be_unique(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb\na\n")
    with pytest.raises(ConversionError, match="holds 'a' twice"):
        read_vocabulary(tmp_path / "vocab.txt")
