"""Text to training examples: the offline corpus, tokenizing, packing, streams, completions."""

from __future__ import annotations

from hf_ouroboros.data.byte_tokenizer import BYTE_VOCAB_SIZE, END_OF_TEXT, byte_tokenizer
from hf_ouroboros.data.completion import IGNORE_INDEX, CompletionCollator, CompletionDataset
from hf_ouroboros.data.corpus import Corpus, Document, default_corpus
from hf_ouroboros.data.errors import (
    DataError,
    DataFileNotFoundError,
    EmptyDataError,
    MissingColumnError,
    NoStdlibSourcesError,
    NoValidationDataError,
)
from hf_ouroboros.data.packing import PackedBlocks, pack_blocks, pack_texts
from hf_ouroboros.data.stream import (
    StreamCollator,
    StreamRow,
    StreamSegments,
    check_stream_arguments,
    ends_lines,
    text_stream,
    tokenized_stream,
)
from hf_ouroboros.data.text_files import TextSplits, load_texts
from hf_ouroboros.data.tokenizing import tokenize_texts

__all__ = [
    "BYTE_VOCAB_SIZE",
    "END_OF_TEXT",
    "IGNORE_INDEX",
    "CompletionCollator",
    "CompletionDataset",
    "Corpus",
    "DataError",
    "DataFileNotFoundError",
    "Document",
    "EmptyDataError",
    "MissingColumnError",
    "NoStdlibSourcesError",
    "NoValidationDataError",
    "PackedBlocks",
    "StreamCollator",
    "StreamRow",
    "StreamSegments",
    "TextSplits",
    "byte_tokenizer",
    "check_stream_arguments",
    "default_corpus",
    "ends_lines",
    "load_texts",
    "pack_blocks",
    "pack_texts",
    "text_stream",
    "tokenize_texts",
    "tokenized_stream",
]
