from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_ouroboros.data import (
    DataError,
    DataFileNotFoundError,
    EmptyDataError,
    MissingColumnError,
    NoValidationDataError,
    TextSplits,
    load_texts,
)

pytest.importorskip("datasets")

LINES = "".join(f"line {i}, caf\u00e9\n" for i in range(100))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., TextSplits]:
    return lambda **options: load_texts(cache_dir=str(tmp_path / "cache"), **options)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if not isinstance(content, str):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content, encoding="utf-8")
        return path

    return write_file


@pytest.mark.parametrize("name", ["train.txt", "script.py", "no_suffix", "odd[1]*name.txt"])
def test_a_text_file_is_one_document_and_its_end_is_held_out(load, write, name: str) -> None:
    splits = load(train_file=write(name, LINES), validation_share=0.2)
    (train,), (validation,) = splits.train["text"], splits.validation["text"]
    assert train + validation == LINES
    assert train.endswith("\n")
    assert validation.startswith("line 80")
    assert splits.kind == "text"


def test_a_text_without_lines_is_cut_anywhere(load, write) -> None:
    splits = load(train_file=str(write("train.txt", "ab" * 500)), validation_share=0.1)
    assert [len(splits.train[0]["text"]), len(splits.validation[0]["text"])] == [900, 100]


def test_validation_file_is_used_whole(load, write) -> None:
    splits = load(train_file=write("train.txt", LINES), validation_file=write("valid.txt", "held out\n\n"))
    assert splits.train["text"][:] == [LINES]
    assert splits.validation["text"][:] == ["held out\n\n"]


def test_several_files_are_several_documents(load, write) -> None:
    files = [write(f"{i}.txt", f"text {i}") for i in range(4)]
    splits = load(train_file=files, validation_share=0.25)
    assert len(splits.train) == 3
    assert sorted([*splits.train["text"], *splits.validation["text"]]) == [f"text {i}" for i in range(4)]


def test_json_rows_are_held_out_by_a_fixed_draw(load, write) -> None:
    rows = [{"text": f"t{i}", "id": i} for i in range(50)]
    first, second = (load(train_file=write(name, rows), validation_share=0.1) for name in ("a.jsonl", "b.jsonl"))
    assert len(first.validation) == 5
    assert sorted([*first.train["id"], *first.validation["id"]]) == list(range(50))
    assert first.validation["id"][:] == second.validation["id"][:] != list(range(45, 50))


def test_json_may_be_a_list_and_name_its_column(load, write) -> None:
    file = write("rows.json", json.dumps([{"body": "x"}, {"body": "y"}]))
    splits = load(train_file=file, validation_share=0.5, text_column="body")
    assert splits.text_column == "body"
    assert sorted([*splits.train["body"], *splits.validation["body"]]) == ["x", "y"]


def test_prompt_and_completion_rows(load, write) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(10)]
    splits = load(train_file=write("train.jsonl", rows), validation_share=0.1)
    assert splits.kind == "completion"
    assert (len(splits.train), len(splits.validation)) == (9, 1)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_share_never_empties_a_side(load, write, share: float) -> None:
    splits = load(train_file=write("t.jsonl", [{"text": "a"}, {"text": "b"}]), validation_share=share)
    assert len(splits.train) == len(splits.validation) == 1


def test_nothing_is_held_out_on_demand(load, write) -> None:
    assert load(train_file=write("train.txt", LINES), validation_share=0.0).validation is None


@pytest.mark.parametrize("split", ["validation", "valid", None])
def test_a_named_dataset_with_and_without_validation(load, write, tmp_path: Path, split: str | None) -> None:
    write("folder/train.jsonl", [{"text": f"t{i}"} for i in range(20)])
    if split:
        write(f"folder/{split}.jsonl", [{"text": "v"}])
    splits = load(dataset_name=str(tmp_path / "folder"), validation_share=0.1)
    assert (len(splits.train), len(splits.validation)) == ((20, 1) if split else (18, 2))


TEXT_ROWS = [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"body": "a"}], MissingColumnError, r"\['body'\], but neither 'text' .* prompt and completion"),
        ([{"prompt": "a"}], MissingColumnError, r"\['prompt'\], but neither"),
        ([{"text": 3}, {"text": 4}], MissingColumnError, "string in every row of column 'text'.*int64"),
        ([{"text": "a"}, {"text": None}], MissingColumnError, "1 of 2 rows hold nothing"),
        ([{"text": " "}, {"text": "\n"}], EmptyDataError, "column 'text' is blank in all 2 rows"),
        ([{"prompt": "a", "completion": ""}], EmptyDataError, "column 'completion' is blank"),
        ("", EmptyDataError, r"train\.jsonl is empty"),
        ("\n\n", DataError, "train_file: cannot read"),
        ("{not json", DataError, "train_file: cannot read .*train.jsonl"),
        (
            [{"text": "a"}],
            NoValidationDataError,
            "single short text: validation_share=0.05 .*validation_file",
        ),
        ([{"prompt": "a", "completion": "b"}], NoValidationDataError, "single short example"),
    ],
)
def test_unusable_rows_are_named(load, write, rows: Any, error: type[DataError], message: str) -> None:
    with pytest.raises(error, match=message):
        load(train_file=write("train.jsonl", rows))


def test_an_empty_text_file_is_named(load, write) -> None:
    with pytest.raises(EmptyDataError, match=r"train_file: .*train\.txt is empty"):
        load(train_file=write("train.txt", ""))
    with pytest.raises(EmptyDataError, match="validation data"):
        load(train_file=write("full.txt", LINES), validation_file=write("valid.txt", "\n"))


def test_a_file_that_is_not_utf8_is_named(load, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"train_file: cannot read .*latin\.txt as UTF-8"):
        load(train_file=tmp_path / "latin.txt")


def test_both_files_must_exist_before_any_is_read(load, write, tmp_path: Path) -> None:
    with pytest.raises(DataFileNotFoundError, match="^train_file: no file at .*nowhere"):
        load(train_file=tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="^validation_file: no file at"):
        load(train_file=write("train.jsonl", "{not json"), validation_file=tmp_path / "nowhere.txt")


def test_options_that_contradict_each_other_are_named(load, write) -> None:
    file = write("train.txt", LINES)
    completions = write("valid.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="train_file or dataset_name, one of the two"):
        load()
    with pytest.raises(DataError, match="train_file or dataset_name, one of the two"):
        load(train_file=file, dataset_name="wikitext")
    with pytest.raises(DataError, match=r"validation_share must be .* got 1\.0"):
        load(train_file=file, validation_share=1.0)
    with pytest.raises(DataError, match="empty list"):
        load(train_file=[])
    with pytest.raises(DataError, match="mixes JSON and plain text"):
        load(train_file=[file, completions])
    with pytest.raises(MissingColumnError, match="training data have text columns .* completion columns"):
        load(train_file=file, validation_file=completions)
