from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_ouroboros.data import (
    CompletionCollator,
    EmptyDataError,
    PackedBlocks,
    byte_tokenizer,
    pack_blocks,
    pack_texts,
)

EOS = 256


def joined(documents: list[list[int]]) -> list[int]:
    """The stream as it is defined: non-empty documents with an end-of-text between each two."""
    stream: list[int] = []
    for document in filter(None, documents):
        stream += [EOS, *document] if stream else document
    return stream


@given(st.lists(st.lists(st.integers(0, 255), max_size=30), max_size=10), st.integers(2, 20), st.booleans())
def test_blocks_are_the_stream_and_lose_nothing_but_the_remainder(
    documents: list[list[int]], block_size: int, drop_remainder: bool
) -> None:
    stream = joined(documents)
    remainder = len(stream) % block_size
    lost = remainder if drop_remainder or remainder == 1 else 0
    kept = stream[: len(stream) - lost]
    if not kept:
        with pytest.raises(EmptyDataError, match=f"block_size={block_size}"):
            pack_blocks(documents, block_size, EOS, drop_remainder)
        return
    blocks = pack_blocks(documents, block_size, EOS, drop_remainder)
    assert [token for block in blocks for token in block["input_ids"].tolist()] == kept
    assert all(len(block["input_ids"]) == block_size for block in list(blocks)[:-1])
    assert len(blocks) == -(-len(kept) // block_size)
    assert blocks.num_tokens == len(kept)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_documents_may_be_any_sequence_of_ids(kind: type) -> None:
    blocks = pack_blocks((kind(ids) for ids in ([1, 2], [3, 4, 5])), block_size=3, eos_id=0)
    assert [block["input_ids"].tolist() for block in blocks] == [[1, 2, 0], [3, 4, 5]]


def test_items_are_int64_copies_from_an_int32_store() -> None:
    blocks = pack_blocks([range(10)], block_size=5, eos_id=EOS)
    assert blocks.tokens.dtype == torch.int32
    item = blocks[1]
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    item["labels"].fill_(-100)
    item["input_ids"].fill_(7)
    assert blocks[1]["labels"].tolist() == blocks[1]["input_ids"].tolist() == [5, 6, 7, 8, 9]


def test_is_a_map_style_dataset() -> None:
    blocks = pack_blocks([range(12)], block_size=4, eos_id=EOS)
    assert blocks[-1]["input_ids"].tolist() == [8, 9, 10, 11]
    for index in (3, -4):
        with pytest.raises(IndexError):
            blocks[index]
    assert len(pickle.loads(pickle.dumps(blocks))) == 3
    batch = next(iter(DataLoader(blocks, batch_size=3, collate_fn=default_data_collator)))
    assert batch["labels"].shape == (3, 4)


def test_a_kept_remainder_is_padded_by_the_collator() -> None:
    blocks = pack_blocks([range(7)], block_size=4, eos_id=EOS, drop_remainder=False)
    batch = CompletionCollator(byte_tokenizer())([*blocks])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, EOS]]
    assert batch["labels"].tolist() == [[0, 1, 2, 3], [4, 5, 6, -100]]


@pytest.mark.parametrize("block_size", [1, 0, -4])
def test_refuses_blocks_that_predict_nothing(block_size: int) -> None:
    with pytest.raises(ValueError, match="block_size must be at least 2"):
        PackedBlocks(torch.arange(10), block_size)


def test_texts_are_tokenized_and_separated() -> None:
    blocks = pack_texts(["ab", "", "c", "de"], byte_tokenizer(), block_size=7)
    assert blocks[0]["input_ids"].tolist() == [97, 98, EOS, 99, EOS, 100, 101]


def test_a_megabyte() -> None:
    text = "The quick brown fox jumps over the lazy dog.\n" * 23_000
    blocks = pack_texts([text], byte_tokenizer(), block_size=1000)
    assert blocks.tokens.to(torch.uint8).numpy().tobytes() == text.encode()


def test_needs_an_end_of_text_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        pack_texts(["text"], tokenizer, block_size=2)


def test_packs_a_column_of_a_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": ["ab", "cd"]})
    blocks = pack_texts(rows, byte_tokenizer(), block_size=5, text_column="body")
    assert blocks[0]["input_ids"].tolist() == [97, 98, EOS, 99, 100]
