from __future__ import annotations

import logging
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ouroboros.data import (
    CompletionCollator,
    CompletionDataset,
    EmptyDataError,
    MissingColumnError,
    byte_tokenizer,
)

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id


def one(prompt: str, completion: str, max_length: int = 100) -> tuple[list[int], list[int], CompletionDataset]:
    dataset = CompletionDataset([{"prompt": prompt, "completion": completion}], TOKENIZER, max_length)
    (item,) = dataset
    return item["input_ids"].tolist(), item["labels"].tolist(), dataset


def test_labels_cover_the_completion_and_its_end_only() -> None:
    ids, labels, _ = one("ab", "cd")
    assert ids == [*b"abcd", EOS]
    assert labels == [-100, -100, *b"cd", EOS]


def test_the_prompt_loses_its_beginning_first() -> None:
    ids, labels, dataset = one("abcdef", "xy", max_length=5)
    assert ids == [*b"efxy", EOS]
    assert labels == [-100, -100, *b"xy", EOS]
    assert (dataset.cut_prompts, dataset.cut_completions) == (1, 0)


def test_a_cut_completion_keeps_one_prompt_token_and_does_not_end() -> None:
    ids, labels, dataset = one("abc", "uvwxyz", max_length=4)
    assert ids == [*b"cuvw"]
    assert labels == [-100, *b"uvw"]
    assert (dataset.cut_prompts, dataset.cut_completions) == (1, 1)


def test_an_empty_prompt_is_allowed() -> None:
    assert one("", "xy")[:2] == ([*b"xy", EOS], [*b"xy", EOS])


@given(st.text(max_size=12), st.text(min_size=1, max_size=12).filter(str.strip), st.integers(2, 60))
@settings(deadline=None)
def test_something_of_every_completion_is_learnt(prompt: str, completion: str, max_length: int) -> None:
    ids, labels, dataset = one(prompt, completion, max_length)
    full = [*completion.encode(), EOS]
    learnt = [label for label in labels if label != -100]
    assert len(ids) == len(labels) <= max_length
    assert any(label != -100 for label in labels[1:])  # the first position is never predicted
    assert learnt == full[: len(learnt)]
    assert (len(learnt) < len(full)) == bool(dataset.cut_completions)
    prompt_ids = ids[: len(ids) - len(learnt)]
    assert prompt_ids == [*prompt.encode()][len(prompt.encode()) - len(prompt_ids) :]
    assert (len(prompt_ids) < len(prompt.encode())) == bool(dataset.cut_prompts)


def test_a_beginning_of_text_token_comes_as_in_generation() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOS)]
    )
    (item,) = CompletionDataset([{"prompt": "a", "completion": "b"}], tokenizer, max_length=10)
    assert item["input_ids"].tolist() == [*tokenizer("a")["input_ids"], *b"b", EOS] == [EOS, *b"ab", EOS]
    assert item["labels"].tolist() == [-100, -100, *b"b", EOS]


def test_blank_completions_are_an_error_or_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    examples = [{"prompt": "p", "completion": text} for text in ("a", " ", "", "b")]
    with pytest.raises(EmptyDataError, match="Example 1 has a blank completion ' '.*on_empty='drop'"):
        CompletionDataset(examples, TOKENIZER, max_length=10)
    with caplog.at_level(logging.WARNING):
        dataset = CompletionDataset(examples, TOKENIZER, max_length=10, on_empty="drop")
    assert (len(dataset), dataset.dropped) == (2, 2)
    assert "2 examples with a blank completion dropped" in caplog.text
    with pytest.raises(EmptyDataError, match=r"left \(2 had a blank one\)"):
        CompletionDataset(examples[1:3], TOKENIZER, max_length=10, on_empty="drop")


@pytest.mark.parametrize("example", [{"prompt": "a"}, {"completion": "a"}, {"prompt": "a", "completion": ["b"]}])
def test_examples_without_both_strings_are_named(example: dict) -> None:
    with pytest.raises(MissingColumnError, match="Example 0 needs a string in '(prompt|completion)'"):
        CompletionDataset([example], TOKENIZER, max_length=10)


def test_options_are_checked() -> None:
    examples = [{"prompt": "a", "completion": "b"}]
    no_end = byte_tokenizer()
    no_end.eos_token = no_end.pad_token = None
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        CompletionDataset(examples, TOKENIZER, max_length=1)
    with pytest.raises(ValueError, match="on_empty must be 'error' or 'drop', got 'skip'"):
        CompletionDataset(examples, TOKENIZER, max_length=9, on_empty="skip")
    with pytest.raises(ValueError, match="no eos_token"):
        CompletionDataset(examples, no_end, max_length=9)
    with pytest.raises(ValueError, match="no pad_token and no eos_token"):
        CompletionCollator(no_end)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be positive"):
        CompletionCollator(TOKENIZER, pad_to_multiple_of=0)


def test_is_a_map_style_dataset_of_many_batches() -> None:
    texts = [str(i) for i in range(2345)]
    dataset = CompletionDataset([{"prompt": "n", "completion": text} for text in texts], TOKENIZER, 10)
    dataset = pickle.loads(pickle.dumps(dataset))
    assert [TOKENIZER.decode(item["input_ids"][1:-1]) for item in dataset] == texts
    assert dataset[-1]["input_ids"].tolist() == dataset[2344]["input_ids"].tolist()
    for index in (2345, -2346):
        with pytest.raises(IndexError):
            dataset[index]


def test_reads_a_dataset_of_rows() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "id": [3]})
    (item,) = CompletionDataset(rows, TOKENIZER, max_length=10)
    assert item["input_ids"].tolist() == [*b"ab", EOS]


@pytest.mark.parametrize(("multiple", "length"), [(None, 5), (1, 5), (4, 8), (5, 5)])
def test_collator_pads_on_the_right(multiple: int | None, length: int) -> None:
    examples = [{"prompt": "ab", "completion": "cd"}, {"prompt": "x", "completion": "y"}]
    collator = CompletionCollator(TOKENIZER, pad_to_multiple_of=multiple)
    batch = collator([*CompletionDataset(examples, TOKENIZER, max_length=10)])
    assert collator.tokenizer is TOKENIZER
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, length)}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    padding = length - 5
    assert batch["input_ids"].tolist() == [
        [*b"abcd", EOS] + [EOS] * padding,
        [*b"xy"] + [EOS] * (3 + padding),
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * padding, [1] * 3 + [0] * (2 + padding)]
    assert batch["labels"].tolist() == [
        [-100, -100, *b"cd", EOS] + [-100] * padding,
        [-100, *b"y", EOS] + [-100] * (2 + padding),
    ]


def test_collator_takes_lists_and_falls_back_to_the_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    examples = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]
    assert CompletionCollator(tokenizer)(examples)["input_ids"].tolist() == [[1, 2], [3, EOS]]
