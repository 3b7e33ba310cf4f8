from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from hf_ouroboros.data import DataError, DataFileNotFoundError, byte_tokenizer, text_stream
from hf_ouroboros.data.prepared import PreparedSplit, PreparedStreams, TextUnits, count_units
from hf_ouroboros.data.words import word_tokenizer


def test_streams_come_back_as_they_were_mapped_from_their_files(tmp_path: Path) -> None:
    units = TextUnits(1, 2, 3)
    splits = {
        name: PreparedSplit(np.array(ids), units) for name, ids in (("train", [0, 255]), ("validation", [256, 7, 7]))
    }
    PreparedStreams("A text.", splits).save(tmp_path / "data", byte_tokenizer())
    found = PreparedStreams.load(tmp_path / "data")
    assert found.description == "A text." and found.split("validation").units == units
    for name, dtype in (("train", np.uint8), ("validation", np.uint16)):
        tokens = found.split(name).tokens
        assert isinstance(tokens, np.memmap) and tokens.dtype == dtype
        assert tokens.tolist() == splits[name].tokens.tolist()
    assert AutoTokenizer.from_pretrained(tmp_path / "data").get_vocab() == byte_tokenizer().get_vocab()
    with pytest.raises(DataError, match="split='test'.*train, validation"):
        found.split("test")


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataFileNotFoundError, match="no prepared streams"):
        PreparedStreams.load(tmp_path)
    PreparedStreams("", {"train": PreparedSplit(np.zeros(5, int), TextUnits(5, 5, 1))}).save(tmp_path, byte_tokenizer())
    np.save(tmp_path / "train.npy", np.zeros(4, np.uint8))
    with pytest.raises(DataError, match="has 4 tokens, not 5"):
        PreparedStreams.load(tmp_path)
    (tmp_path / "train.npy").unlink()
    with pytest.raises(DataFileNotFoundError, match="train.npy is missing"):
        PreparedStreams.load(tmp_path)
    (tmp_path / "stream.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(DataError, match="format 0"):
        PreparedStreams.load(tmp_path)


def test_units_of_text_and_of_bytes() -> None:
    assert count_units(["ä b", "c\n"]) == count_units(["ä b".encode(), b"c\n"]) == TextUnits(6, 5, 3)
    assert count_units([b"\xc3"]) == TextUnits(1, 1, 1)  # half a character


def test_words_by_frequency_behind_the_end_of_line() -> None:
    lines = [" b a b \n", "\n", " <unk> b <eos>\n", "a c"]
    tokenizer = word_tokenizer(lines)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == ["<eos>", "b", "a", "<unk>", "c"]
    assert text_stream(lines, tokenizer).tolist() == [1, 2, 1, 0, 0, 3, 1, 0, 0, 2, 4, 0]
    small = word_tokenizer(["b a b c"], max_words=1)
    assert text_stream(["b a"], small).tolist() == [1, 2, 0] and small.unk_token == "<unk>"
