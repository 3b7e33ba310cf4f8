"""What pretrain_lm.py trains on: text or prepared streams, packed into blocks or cut into contiguous columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import CORPUS_BYTES, OptionError, count_characters, limit_bytes, stdlib_corpus
from transformers import AutoTokenizer, PreTrainedTokenizerBase, default_data_collator

from hf_ouroboros import OuroborosArguments
from hf_ouroboros.data import (
    BYTE_VOCAB_SIZE,
    PackedBlocks,
    StreamCollator,
    StreamSegments,
    byte_tokenizer,
    check_stream_arguments,
    load_texts,
    pack_texts,
    text_stream,
)
from hf_ouroboros.data.prepared import PreparedStreams
from hf_ouroboros.data.words import word_tokenizer

if TYPE_CHECKING:
    from pretrain_lm import ScriptArguments

SMOKE_TOKENS = 100_000  # of prepared streams


@dataclass
class Texts:
    """Text of a corpus, not yet tokenized."""

    train: list[str]
    validation: list[str]
    description: str


@dataclass
class Examples:
    """Training and validation data as the trainer takes them.

    Args:
        train, validation: data sets.
        collator: makes batches of their rows.
        tokens_per_unit: validation tokens per character, or byte.
        unit: which of them: `"byte"` or `"character"`.
    """

    train: PackedBlocks | StreamSegments
    validation: PackedBlocks | StreamSegments
    collator: Callable[[list[Any]], dict[str, Any]]
    tokens_per_unit: float
    unit: str

    def unigram_nats(self, vocabulary: int) -> float:
        """Nats per validation token of a model that knows nothing but how often each token is in the training data."""
        counts = (
            np.bincount(np.asarray(self.train.tokens), minlength=vocabulary) + 1.0
        )  # plus one: no token is impossible
        nats = -np.log(counts / counts.sum())
        return float(nats[np.asarray(self.validation.tokens)].mean())


def read_source(script: ScriptArguments) -> Texts | PreparedStreams:
    """The corpus that the options name; by default the standard library of this Python.

    A smoke test whose `data_dir` isn't there reads the default, too, and forgets `data_dir`.
    """
    if script.data_dir is not None and (script.train_file is not None or script.dataset_name is not None):
        raise OptionError("data_dir is a corpus by itself; leave out train_file and dataset_name")
    instead = ""
    if script.data_dir is not None and script.smoke and not Path(script.data_dir).is_dir():
        instead = f"(smoke test: there is no {script.data_dir}) "
        script.data_dir = None
    if script.data_dir is not None:
        return PreparedStreams.load(script.data_dir)
    if script.train_file is None and script.dataset_name is None:
        bytes_ = script.max_train_bytes or CORPUS_BYTES
        corpus = stdlib_corpus(bytes_, script.validation_share)
        described = (
            f"{instead}Source files of Python's standard library: {bytes_:,} bytes for training, other files for "
            "validation."
        )
        return Texts(corpus.train_texts, corpus.validation_texts, described)
    splits = load_texts(
        script.train_file,
        script.validation_file,
        script.dataset_name,
        script.dataset_config,
        script.validation_share,
        script.text_column,
    )
    if splits.kind != "text":
        raise OptionError(
            f"train_file: pretraining needs a column {script.text_column!r}; finetune_lm.py takes prompts"
        )
    if splits.validation is None:
        raise OptionError("validation_share=0 leaves nothing to evaluate on; give a validation_file or a share")
    train = limit_bytes((row[splits.text_column] for row in splits.train), script.max_train_bytes)
    files = ", ".join(Path(name).name for name in script.train_file or [])
    described = f"Text of {script.dataset_name or files}."
    return Texts(list(train), splits.validation[splits.text_column][:], described)


def make_tokenizer(script: ScriptArguments, source: Texts | PreparedStreams) -> PreTrainedTokenizerBase:
    """The tokenizer that the options name, or that belongs to the checkpoint or the data."""
    named = script.tokenizer_name or script.data_dir or script.model_name_or_path
    if named:
        return AutoTokenizer.from_pretrained(named)
    return word_tokenizer(source.train) if script.vocabulary == "words" else byte_tokenizer(script.block_size)


def make_examples(
    script: ScriptArguments,
    args: OuroborosArguments,
    source: Texts | PreparedStreams,
    tokenizer: PreTrainedTokenizerBase,
    has_memory: bool,
) -> Examples:
    """Rows for training and validation: blocks in random order, or a stream in its own."""
    if not has_memory and script.columns is None and isinstance(source, Texts):
        train = pack_texts(source.train, tokenizer, script.block_size)
        validation = pack_texts(source.validation, tokenizer, script.block_size)
        characters, unit = count_characters(source.validation, tokenizer)
        return Examples(train, validation, default_data_collator, len(validation.tokens) / characters, unit)

    if isinstance(source, Texts):
        tokens, validation_tokens = (text_stream(texts, tokenizer) for texts in (source.train, source.validation))
        characters, unit = count_characters(source.validation, tokenizer)
        tokens_per_unit = len(validation_tokens) / characters
    else:
        tokens, held_out = source.split("train").tokens, source.split("validation")
        unit = "byte" if len(tokenizer) == BYTE_VOCAB_SIZE else "character"
        tokens_per_unit = len(held_out.tokens) / getattr(held_out.units, f"{unit}s")
        validation_tokens = held_out.tokens
        if script.smoke:
            tokens, validation_tokens = tokens[:SMOKE_TOKENS], validation_tokens[: SMOKE_TOKENS // 5]

    # A stream is read in its own order, whatever order blocks would have had.
    args.train_sampling_strategy, args.dataloader_drop_last = "sequential", True
    replicas = args.data_parallel_replicas
    columns = script.columns or args.train_batch_size * replicas * args.gradient_accumulation_steps
    train = StreamSegments(tokens, columns, script.block_size)
    eval_length, eval_columns = script.eval_segment_len or script.block_size, args.eval_batch_size * replicas
    validation = StreamSegments(validation_tokens, eval_columns, eval_length, keep_tail=True)
    check_stream_arguments(args, train, validation)
    return Examples(train, validation, StreamCollator(positions=has_memory), tokens_per_unit, unit)
