"""The text a recipe trains on: local files or a dataset's name in, training and validation rows out."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_ouroboros.data.errors import (
    DataError,
    DataFileNotFoundError,
    EmptyDataError,
    MissingColumnError,
    NoValidationDataError,
)

if TYPE_CHECKING:
    from datasets import Dataset

    Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

JSON_SUFFIXES = (".json", ".jsonl")
COMPLETION_COLUMNS = ("prompt", "completion")
_VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
_HOLD_OUT_SEED = 0


@dataclass(frozen=True)
class TextSplits:
    """Rows for training and validation.

    Attributes:
        train: rows with the text column, or with the columns `prompt` and `completion`.
        validation: the same columns; None only if `validation_share=0` and no validation data were given.
        kind: `"text"` or `"completion"`.
        text_column: name of the text column, where `kind` is `"text"`.
    """

    train: Dataset
    validation: Dataset | None
    kind: Literal["text", "completion"]
    text_column: str


def load_texts(
    train_file: Files | None = None,
    validation_file: Files | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    validation_share: float = 0.05,
    text_column: str = "text",
    cache_dir: str | None = None,
) -> TextSplits:
    """Load training and validation text from files or from a dataset of the Hub.

    `.json` and `.jsonl` files need a text column, or `prompt` and `completion`; every other file is plain
    text and one document. Without validation data a fixed share of the training data is held out: the end of
    the text if there is a single text, rows drawn with a fixed seed otherwise.

    Args:
        train_file: one file or several of one kind.
        validation_file: one file or several; takes precedence over holding out.
        dataset_name: name on the Hub, or a folder that `datasets.load_dataset` can read; instead of
            `train_file`.
        dataset_config: the dataset's configuration, such as `wikitext-103-raw-v1`.
        validation_share: share to hold out, at least 0 and below 1; 0 holds nothing out.
        text_column: the column with the text.
        cache_dir: where `datasets` keeps its files; its default if None.

    Raises:
        DataFileNotFoundError: a file does not exist.
        MissingColumnError: neither the text column nor prompt and completion are there, or not as strings.
        EmptyDataError: no row holds any text.
        NoValidationDataError: there is too little data to hold anything out.
        DataError: the options contradict each other, or a file cannot be read.
    """
    if (train_file is None) == (dataset_name is None):
        raise DataError(
            f"Give train_file or dataset_name, one of the two; got train_file={train_file!r}, "
            f"dataset_name={dataset_name!r}."
        )
    if not 0.0 <= validation_share < 1.0:
        raise DataError(f"validation_share must be at least 0 and below 1, got {validation_share}.")
    # All files first, so that a misspelt validation_file shows before minutes of reading.
    train_paths = None if train_file is None else _existing("train_file", train_file)
    validation_paths = None if validation_file is None else _existing("validation_file", validation_file)

    if train_paths is not None:
        train, validation = _load_files("train_file", train_paths, cache_dir), None
    else:
        assert dataset_name is not None  # the one or the other is given
        train, validation = _load_named(dataset_name, dataset_config, cache_dir)
    if validation_paths is not None:
        validation = _load_files("validation_file", validation_paths, cache_dir)

    kind = _checked_kind("training data", train, text_column)
    if validation is not None:
        validation_kind = _checked_kind("validation data", validation, text_column)
        if validation_kind != kind:
            raise MissingColumnError(
                f"The training data have {kind} columns {train.column_names}, the validation data "
                f"{validation_kind} columns {validation.column_names}: use the same kind for both."
            )
    elif validation_share > 0.0:
        train, validation = _hold_out(train, validation_share, text_column if kind == "text" else None)
    return TextSplits(train, validation, kind, text_column)


def _existing(option: str, files: Files) -> list[Path]:
    paths = [Path(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    if not paths:
        raise DataError(f"{option} is an empty list: name at least one file.")
    for path in paths:
        if not path.is_file():
            raise DataFileNotFoundError(f"{option}: no file at {path} (working directory {Path.cwd()}).")
    if len({path.suffix in JSON_SUFFIXES for path in paths}) > 1:
        raise DataError(f"{option} mixes JSON and plain text: {[str(path) for path in paths]}. Use one kind.")
    return paths


def _load_files(option: str, paths: list[Path], cache_dir: str | None) -> Dataset:
    import datasets

    names = ", ".join(str(path) for path in paths)
    if not any(path.stat().st_size for path in paths):
        raise EmptyDataError(f"{option}: {names} is empty.")
    data_files = [glob.escape(str(path.absolute())) for path in paths]
    try:
        if paths[0].suffix in JSON_SUFFIXES:
            return datasets.load_dataset("json", data_files=data_files, split="train", cache_dir=cache_dir)
        return datasets.load_dataset(
            "text", data_files=data_files, split="train", sample_by="document", cache_dir=cache_dir
        )
    except (datasets.exceptions.DatasetGenerationError, StopIteration, ValueError) as error:
        raise DataError(
            f"{option}: cannot read {names} as UTF-8 text or JSON rows: {error.__cause__ or error}"
        ) from error


def _load_named(dataset_name: str, dataset_config: str | None, cache_dir: str | None) -> tuple[Dataset, Dataset | None]:
    import datasets

    splits = datasets.load_dataset(dataset_name, dataset_config, cache_dir=cache_dir)
    if "train" not in splits:
        raise DataError(f"dataset_name={dataset_name!r} has no train split; it has {sorted(splits)}.")
    return splits["train"], next((splits[name] for name in _VALIDATION_SPLITS if name in splits), None)


def _checked_kind(what: str, rows: Dataset, text_column: str) -> Literal["text", "completion"]:
    """Whether the rows are texts or completions, after making sure that they are usable."""
    if len(rows) == 0:
        raise EmptyDataError(f"The {what} have no rows.")
    kind: Literal["text", "completion"] = "text" if text_column in rows.column_names else "completion"
    columns = (text_column,) if kind == "text" else COMPLETION_COLUMNS
    if not set(columns) <= set(rows.column_names):
        raise MissingColumnError(
            f"The {what} have the columns {rows.column_names}, but neither {text_column!r} (option "
            f"text_column) nor {' and '.join(COMPLETION_COLUMNS)}."
        )
    for column in columns:
        feature, missing = rows.features[column], rows.data.column(column).null_count
        if getattr(feature, "dtype", None) not in ("string", "large_string") or missing:
            raise MissingColumnError(
                f"The {what} need a string in every row of column {column!r}; it holds {feature}, and "
                f"{missing} of {len(rows)} rows hold nothing."
            )
    last = columns[-1]
    batches = rows.select_columns(last).iter(batch_size=1000)
    if not any(value.strip() for batch in batches for value in batch[last]):
        raise EmptyDataError(f"The {what} hold no text: column {last!r} is blank in all {len(rows)} rows.")
    return kind


def _hold_out(rows: Dataset, share: float, text_column: str | None) -> tuple[Dataset, Dataset]:
    """Split off about `share` of the rows, or of the text if a single text is all there is."""
    import datasets

    if len(rows) > 1:
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        splits = rows.train_test_split(test_size=count, seed=_HOLD_OUT_SEED, shuffle=True)
        return splits["train"], splits["test"]
    if text_column is not None:
        text = rows[0][text_column]
        cut = text.rfind("\n", 0, round(len(text) * (1.0 - share))) + 1
        if cut == 0:  # no lines
            cut = round(len(text) * (1.0 - share))
        if text[:cut].strip() and text[cut:].strip():
            parts = ({text_column: [part]} for part in (text[:cut], text[cut:]))
            return tuple(datasets.Dataset.from_dict(part) for part in parts)
    raise NoValidationDataError(
        f"The training data are a single short {'text' if text_column else 'example'}: "
        f"validation_share={share} leaves nothing to hold out. Name a validation_file, add data, or set "
        "validation_share=0."
    )
