from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_ouroboros.data import MissingColumnError, byte_tokenizer, tokenize_texts, tokenizing

TEXT = "def f(x, y):\n    return x + y\n\n\nclass A:  # a comment\n\tpass\n" * 40


def trained_tokenizer(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None, normalizer: normalizers.Normalizer | None = None
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", model_max_length=10)


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "gpt2-like": trained_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2-like, prefix space": trained_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "metaspace": trained_tokenizer(pre_tokenizers.Metaspace()),
    "llama2-like": trained_tokenizer(
        normalizer=normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    ),
}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_PIECE_CHARACTERS", 50)
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 120)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [TEXT, "word " * 200, "\n" * 500, "x" * 500, ""], ids=lambda text: text[:4])
def test_pieces_give_the_ids_of_the_whole(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    texts = [text, "a b", text]
    whole = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in tokenize_texts(texts, tokenizer)] == whole


@pytest.mark.usefixtures("small_pieces")
def test_long_texts_are_cut_where_that_is_exact() -> None:
    assert len(list(tokenizing._pieces(TEXT, TOKENIZERS["gpt2-like"]))) > 20
    assert len(list(tokenizing._pieces(TEXT, TOKENIZERS["llama2-like"]))) == 1


@pytest.mark.slow
@given(st.lists(st.text(max_size=200), max_size=5))
@settings(deadline=None)
def test_any_texts_in_small_pieces_become_their_bytes(texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "_PIECE_CHARACTERS", 5)
        patch.setattr(tokenizing, "_BATCH_CHARACTERS", 20)
        result = list(tokenize_texts(texts, TOKENIZERS["bytes"]))
    assert [ids.astype(np.uint8).tobytes() for ids in result] == [text.encode() for text in texts]
    assert all(ids.dtype == np.int32 for ids in result)


def test_says_nothing_about_length(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        list(tokenize_texts([TEXT], TOKENIZERS["gpt2-like"]))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_one_string_is_not_a_list_of_characters() -> None:
    with pytest.raises(TypeError, match="put it into a list"):
        list(tokenize_texts("text", TOKENIZERS["bytes"]))


def test_reads_columns_of_datasets_also_streamed_ones() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["ab", "", "c"], "body": ["x", "y", "z"]})
    for source in (rows, rows.to_iterable_dataset(), rows["text"]):
        assert [ids.tolist() for ids in tokenize_texts(source, TOKENIZERS["bytes"])] == [[97, 98], [], [99]]
    assert [ids.tolist() for ids in tokenize_texts(rows, TOKENIZERS["bytes"], "body")] == [
        [120],
        [121],
        [122],
    ]
    with pytest.raises(MissingColumnError, match="no column 'content'; it has .*'text', 'body'"):
        list(tokenize_texts(rows, TOKENIZERS["bytes"], "content"))
