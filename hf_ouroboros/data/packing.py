"""Documents to blocks of equal length, without padding and without losing a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_ouroboros.data.errors import EmptyDataError
from hf_ouroboros.data.tokenizing import TokenArray, tokenize_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_ouroboros.data.tokenizing import Texts


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """A map-style dataset of consecutive blocks of one token stream.

    Item i is `{"input_ids", "labels"}`, both int64 of shape [block_size] with the same content (the model
    shifts the labels itself). The stream is stored once, as int32.

    Args:
        tokens: the stream, an integer tensor of shape [tokens].
        block_size: tokens per block, at least 2.
        drop_remainder: leave out the last, shorter block. If False it is kept; batches then need a collator
            that pads, such as `CompletionCollator`. A remainder of one token is left out in any case: it
            predicts nothing.

    Raises:
        ValueError: `block_size` is too small.
        EmptyDataError: the tokens do not fill a single block.
    """

    def __init__(self, tokens: Tensor, block_size: int, drop_remainder: bool = True) -> None:
        if block_size < 2:
            raise ValueError(f"block_size must be at least 2 (a token and its successor), got {block_size}.")
        self.tokens = tokens.to(torch.int32)
        self.block_size = block_size
        blocks, remainder = divmod(len(tokens), block_size)
        self._length = blocks + (not drop_remainder and remainder > 1)
        if self._length == 0:
            raise EmptyDataError(
                f"{len(tokens)} tokens do not fill a single block: block_size={block_size}. Use more text, a "
                "smaller block_size, or drop_remainder=False."
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = range(self._length)[index] * self.block_size
        block = self.tokens[start : start + self.block_size].long()
        return {"input_ids": block, "labels": block.clone()}

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks together."""
        return min(len(self.tokens), self._length * self.block_size)


def pack_blocks(
    token_documents: Iterable[Sequence[int] | TokenArray | Tensor],
    block_size: int,
    eos_id: int,
    drop_remainder: bool = True,
) -> PackedBlocks:
    """Join documents, `eos_id` between each two, and cut the stream into blocks of `block_size` tokens.

    Blocks cross document borders. No token is lost or repeated, except for the last `tokens % block_size`
    ones when `drop_remainder` is set. Empty documents are skipped.

    Args:
        token_documents: token ids of each document.
        block_size: tokens per block.
        eos_id: the id that separates documents.
        drop_remainder: see `PackedBlocks`.

    Raises:
        EmptyDataError: the tokens do not fill a single block.
    """
    return PackedBlocks(torch.from_numpy(join_tokens(token_documents, eos_id)), block_size, drop_remainder)


def join_tokens(token_documents: Iterable[Sequence[int] | TokenArray | Tensor], eos_id: int | None) -> TokenArray:
    """One stream of all documents, int32 [tokens], with `eos_id` between each two (nothing if None).

    Empty documents are skipped.
    """
    separator = np.asarray([] if eos_id is None else [eos_id], dtype=np.int32)

    def parts() -> Iterator[TokenArray]:
        for document in token_documents:
            tokens = np.asarray(document, dtype=np.int32)
            if tokens.size:
                yield separator
                yield tokens

    # The first separator has no document before it.
    return np.concatenate([np.empty(0, dtype=np.int32), *list(parts())[1:]])


def pack_texts(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    drop_remainder: bool = True,
    text_column: str = "text",
) -> PackedBlocks:
    """Tokenize texts and pack them, separated by the tokenizer's end-of-text token.

    Args:
        texts: strings, or a `datasets.Dataset` with a column of strings.
        tokenizer: any Transformers tokenizer that has an `eos_token`.
        block_size: tokens per block.
        drop_remainder: see `PackedBlocks`.
        text_column: the dataset's column, ignored for plain strings.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
        EmptyDataError: the tokens do not fill a single block.
        MissingColumnError: the dataset has no such column.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no eos_token to separate documents: set it first.")
    documents = tokenize_texts(texts, tokenizer, text_column)
    return pack_blocks(documents, block_size, tokenizer.eos_token_id, drop_remainder)
