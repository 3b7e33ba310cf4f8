"""One long token stream in contiguous columns, so that a model's memory finds in a row what came before.

    stream   a b c d e f g h i j k l m          12 targets: every token but the first
    columns=2, segment_length=3

               segment 0    segment 1
    column 0   a b c        d e f               row k is segment k // columns of column k % columns:
    column 1   g h i        j k l               abc, ghi, def, jkl, in this order
    targets    b c d        e f g               shifted in the stream: no segment loses its last one
               h i j        k l m

A batch of `columns` rows is one segment of every column. Batches that hold a part of the columns, in turn, are the
micro-batches of one update or the shares of replicas; each keeps its columns for good (Dai et al. 2019, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_ouroboros.data.completion import IGNORE_INDEX
from hf_ouroboros.data.errors import EmptyDataError, MissingColumnError
from hf_ouroboros.data.packing import join_tokens
from hf_ouroboros.data.tokenizing import TokenArray, tokenize_lines, tokenize_texts
from hf_ouroboros.errors import UnsupportedOptionError

if TYPE_CHECKING:
    from datasets import Dataset as HFDataset
    from transformers import PreTrainedTokenizerBase, TrainingArguments
    from transformers.trainer_pt_utils import AcceleratorConfig

    from hf_ouroboros.data.tokenizing import Texts


class StreamRow(NamedTuple):
    """One segment of one column.

    No dict, because Trainer takes from dicts what the model's forward doesn't name, such as the two numbers
    (`remove_unused_columns`).

    Args:
        input_ids: int64 [time].
        shift_labels: the token that follows each, int64 [time]; -100 behind the end of a shorter column.
        column: number of the column in the stream.
        segment: number of the segment in the column.
    """

    input_ids: Tensor
    shift_labels: Tensor
    column: int
    segment: int


class StreamSegments(Dataset[StreamRow]):
    """A map-style dataset of the segments of a stream, all columns of one segment before the next segment.

    Batches need a `StreamCollator`, and Trainer the options that `check_stream_arguments` asks for.

    Args:
        tokens: the stream: integers of shape [tokens], a tensor or an array, also one that is mapped from a file.
        columns: columns to cut it into: the rows of all micro-batches (of all replicas) that read a segment.
        segment_length: tokens per row.
        keep_tail: False, for training: all segments are full, and the last tokens, fewer than
            `columns * segment_length`, are left out. True, for evaluation: every token but the first is a target
            exactly once; the last segment may be shorter, and columns differ in length by at most one token.

    Attributes:
        segments: segments per column.
        num_targets: targets in all rows together.

    Raises:
        ValueError: tokens that aren't a row of integers, or a number below 1.
        EmptyDataError: too few tokens for a single segment.
    """

    def __init__(
        self,
        tokens: Tensor | npt.NDArray[np.integer],
        columns: int,
        segment_length: int,
        keep_tail: bool = False,
    ) -> None:
        self.tokens = tokens.numpy() if isinstance(tokens, Tensor) else tokens
        if self.tokens.ndim != 1 or not np.issubdtype(self.tokens.dtype, np.integer):
            raise ValueError(f"tokens must be integers [tokens], got {self.tokens.dtype} {list(self.tokens.shape)}.")
        for name, value in (("columns", columns), ("segment_length", segment_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.columns = columns
        self.segment_length = segment_length
        targets = max(0, len(self.tokens) - 1)
        if not keep_tail:
            targets -= targets % (columns * segment_length)
        # The first `longer` columns have a target more than the others.
        self._shortest, self._longer = divmod(targets, columns)
        self._longest = self._shortest + (self._longer > 0)
        self.segments = -(-self._longest // segment_length)
        self.num_targets = targets
        if self._shortest == 0:
            need = columns if keep_tail else columns * segment_length
            raise EmptyDataError(
                f"{len(self.tokens)} tokens are too few: columns={columns} and segment_length={segment_length} need "
                f"{need + 1} or more. Use more text, fewer columns, or shorter segments."
            )

    def __len__(self) -> int:
        return self.segments * self.columns

    def __getitem__(self, index: int) -> StreamRow:
        segment, column = divmod(range(len(self))[index], self.columns)
        done = segment * self.segment_length
        start = column * self._shortest + min(column, self._longer) + done
        length = min(self.segment_length, self._longest - done)
        targets = min(length, self._shortest + (column < self._longer) - done)
        # Behind a shorter column stands the token after it, or the stream's last: nobody sees it, being the last input.
        window = torch.from_numpy(self.tokens[start : start + length + 1].astype(np.int64))
        shift_labels = torch.full((length,), IGNORE_INDEX)
        shift_labels[:targets] = window[1 : targets + 1]
        return StreamRow(window[:length], shift_labels, column, segment)


class StreamCollator:
    """Rows of one segment to a batch.

    Args:
        positions: whether the batch says where in the stream it is. `OuroborosTrainer` carries memories by it; the
            stock Trainer hands everything to the model, so it needs False.

    Returns (when called with a list of `StreamRow`):
        `input_ids`; `shift_labels`, from which the loss is computed; `labels`, by which Trainer recognises that there
        are any (-100 where `shift_labels` has it, so that both count the same): int64 [rows, time]. With `positions`
        also `stream_columns` and `stream_segments`, int64 [rows].

    Raises:
        ValueError: rows of different segments, in which a memory would not go on.
    """

    def __init__(self, positions: bool = True) -> None:
        self.positions = positions

    def __call__(self, rows: Sequence[StreamRow]) -> dict[str, Tensor]:
        segments = [row.segment for row in rows]
        if len(set(segments)) > 1:
            raise ValueError(
                f"A batch mixes segments {min(segments)} to {max(segments)} of the stream: its rows must be consecutive and "
                "their number divide the stream's columns (see check_stream_arguments)."
            )
        input_ids = torch.stack([row.input_ids for row in rows])
        shift_labels = torch.stack([row.shift_labels for row in rows])
        labels = input_ids.masked_fill(shift_labels == IGNORE_INDEX, IGNORE_INDEX)
        batch = {"input_ids": input_ids, "labels": labels, "shift_labels": shift_labels}
        if self.positions:
            batch["stream_columns"] = torch.tensor([row.column for row in rows])
            batch["stream_segments"] = torch.tensor(segments)
        return batch


def check_stream_arguments(
    args: TrainingArguments, train: StreamSegments | None = None, evaluation: StreamSegments | None = None
) -> None:
    """Makes sure that Trainer reads streams in order, and that every replica keeps its own columns.

    Batch i goes to replica i % R (accelerate's BatchSamplerShard), so columns must be a multiple of R batches.

    Args:
        args: the trainer's arguments.
        train: the stream to train on.
        evaluation: the stream to evaluate on.

    Raises:
        UnsupportedOptionError: another order, batches that could be filled up from elsewhere, or batches that don't
            divide the columns.
    """
    if train is not None:
        if args.train_sampling_strategy != "sequential":
            raise UnsupportedOptionError(
                f"train_sampling_strategy={args.train_sampling_strategy!r} would tear the stream into pieces that don't "
                "follow each other; use 'sequential'"
            )
        if not args.dataloader_drop_last:
            raise UnsupportedOptionError(
                "dataloader_drop_last=False lets a last batch be filled up with rows from the beginning, which don't "
                "follow the stream's end; use True (a stream's rows come out even, so nothing is dropped)"
            )
    for name, data, size in (
        ("train", train, args.train_batch_size),
        ("eval", evaluation, args.eval_batch_size),
    ):
        rows = size * _replicas(args)
        if data is not None and data.columns % rows:
            raise UnsupportedOptionError(
                f"per_device_{name}_batch_size={size} on {_replicas(args)} replica(s) reads {rows} columns at a time, which "
                f"doesn't divide the {name} stream's columns={data.columns}; use a multiple of {rows} columns"
            )


def _replicas(args: TrainingArguments) -> int:
    """How many batches of the data loader make one step of the run."""
    # Annotated as what it may be given as; this is what TrainingArguments makes of it.
    if cast("AcceleratorConfig", args.accelerator_config).split_batches:
        return 1
    return getattr(args, "data_parallel_replicas", args.world_size)


def tokenized_stream(rows: HFDataset, eos_id: int | None = None, column: str = "input_ids") -> TokenArray:
    """The tokenised texts of a `datasets.Dataset`, in order, as one stream: int32 [tokens].

    Args:
        rows: one text per row.
        eos_id: goes between each two texts; None if the rows have their ends, or are pieces of one text.
        column: the column with the token ids.

    Raises:
        MissingColumnError: no such column.
    """
    if column not in rows.column_names:
        raise MissingColumnError(f"The dataset has no column {column!r}; it has {rows.column_names}.")
    return join_tokens((ids for batch in rows.iter(batch_size=1000) for ids in batch[column]), eos_id)


def text_stream(texts: Texts, tokenizer: PreTrainedTokenizerBase, text_column: str = "text") -> TokenArray:
    """Texts as one stream of tokens: int32 [tokens].

    The tokenizer's end-of-text token goes between each two texts; but a tokenizer that ends whatever it is given with
    that token, as those of word-level Transformer-XL models do, is given line by line, as those models were trained.

    Args:
        texts: strings, or a `datasets.Dataset` with a column of strings.
        tokenizer: any Transformers tokenizer that has an `eos_token`.
        text_column: the dataset's column, ignored for plain strings.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
        MissingColumnError: the dataset has no such column.
    """
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no eos_token to separate texts: set it first.")
    if ends_lines(tokenizer):
        return join_tokens(tokenize_lines(texts, tokenizer, text_column), None)
    return join_tokens(tokenize_texts(texts, tokenizer, text_column), eos_id)


def ends_lines(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts its end-of-text token behind whatever it is given, as a mark for the end of a line."""
    return tokenizer("")["input_ids"] == [tokenizer.eos_token_id]
