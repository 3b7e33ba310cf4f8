"""Many texts to token ids, quickly and in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from hf_ouroboros.data.errors import MissingColumnError

if TYPE_CHECKING:
    from datasets import Dataset as HFDataset
    from transformers import PreTrainedTokenizerBase

    Texts: TypeAlias = Iterable[str] | HFDataset

TokenArray = npt.NDArray[np.int32]

_BATCH_CHARACTERS = 2**20  # a tokenizer's intermediate result takes some 200 bytes per character
_BATCH_PIECES = 10_000
_PIECE_CHARACTERS = 2**18
_CUT = re.compile(r"(?<=\S)\s(?=\S)")
_CUT_CONTEXT = 256
_CUT_TRIES = 8


def tokenize_texts(texts: Texts, tokenizer: PreTrainedTokenizerBase, text_column: str = "text") -> Iterator[TokenArray]:
    """Token ids of each text, in order, without special tokens and without length warnings.

    Long texts are handed to the tokenizer in pieces. A cut is made only at a single white-space character
    where tokenizing its surroundings (256 characters on each side) apart gives the same ids as tokenizing
    them together; without such a place the text stays whole.

    Args:
        texts: strings, or a `datasets.Dataset` (also an iterable one) with a column of strings.
        tokenizer: any Transformers tokenizer.
        text_column: the dataset's column, ignored for plain strings.

    Yields:
        One int32 array of shape [tokens] per text.

    Raises:
        MissingColumnError: the dataset has no such column.
    """
    parts: list[TokenArray] = []
    for batch in _batches(_strings(texts, text_column), tokenizer):
        for (_, is_last), ids in zip(batch, _tokenize([piece for piece, _ in batch], tokenizer), strict=True):
            parts.append(np.asarray(ids, dtype=np.int32))
            if is_last:
                yield np.concatenate(parts)
                parts = []


def tokenize_lines(texts: Texts, tokenizer: PreTrainedTokenizerBase, text_column: str = "text") -> Iterator[TokenArray]:
    """Token ids of every line of the texts, in order, each with the special tokens that the tokenizer adds to it.

    Args:
        texts: strings, or a `datasets.Dataset` with a column of strings; the line that ends a text needs no `\\n`.
        tokenizer: any Transformers tokenizer.
        text_column: the dataset's column, ignored for plain strings.

    Yields:
        One int32 array of shape [tokens] for some thousand lines at a time.

    Raises:
        MissingColumnError: the dataset has no such column.
    """
    lines: list[str] = []
    for text in _strings(texts, text_column):
        lines += text.removesuffix("\n").split("\n")
        for start in range(0, len(lines) - _BATCH_PIECES + 1, _BATCH_PIECES):
            yield _tokenize_whole(lines[start : start + _BATCH_PIECES], tokenizer)
        lines = lines[len(lines) - len(lines) % _BATCH_PIECES :]
    if lines:
        yield _tokenize_whole(lines, tokenizer)


def _tokenize_whole(lines: list[str], tokenizer: PreTrainedTokenizerBase) -> TokenArray:
    ids = tokenizer(lines, return_attention_mask=False, verbose=False)["input_ids"]
    return np.concatenate([np.asarray(line, dtype=np.int32) for line in ids])


def _strings(texts: Texts, text_column: str) -> Iterator[str]:
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of strings, got one string: put it into a list.")
    if not hasattr(texts, "column_names"):
        yield from texts
        return
    dataset = cast("HFDataset", texts)
    # An iterable dataset may not know its columns before it is read.
    if dataset.column_names is not None and text_column not in dataset.column_names:
        raise MissingColumnError(f"The dataset has no column {text_column!r}; it has {dataset.column_names}.")
    for rows in dataset.iter(batch_size=1000):
        yield from rows[text_column]


def _batches(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[tuple[str, bool]]]:
    """Groups of consecutive pieces, each with whether it ends its text, of about `_BATCH_CHARACTERS`."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for text in texts:
        for piece, is_last in _pieces(text, tokenizer):
            batch.append((piece, is_last))
            characters += len(piece)
            if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """The text in pieces of at least `_PIECE_CHARACTERS`, each with whether it is the last one."""
    start = tries = 0
    search_from = _PIECE_CHARACTERS
    while len(text) - start > 2 * _PIECE_CHARACTERS and tries < _CUT_TRIES:
        cut = _CUT.search(text, search_from)
        if cut is None:
            break
        at = cut.start()
        left, right = text[max(start, at - _CUT_CONTEXT) : at], text[at : at + _CUT_CONTEXT]
        whole, first, second = _tokenize([left + right, left, right], tokenizer)
        if whole == first + second:
            yield text[start:at], False
            start, tries, search_from = at, 0, at + _PIECE_CHARACTERS
        else:
            tries, search_from = tries + 1, at + 1
    yield text[start:], True
