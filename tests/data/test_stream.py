from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_ouroboros import OuroborosArguments, OuroborosTrainer, UnsupportedOptionError
from hf_ouroboros.data import (
    EmptyDataError,
    MissingColumnError,
    StreamCollator,
    StreamSegments,
    byte_tokenizer,
    check_stream_arguments,
    text_stream,
    tokenized_stream,
)
from hf_ouroboros.models.transfo_xl.vocabulary import Vocabulary, build_tokenizer


def read(data: StreamSegments) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every column, its segments joined."""
    columns: list[tuple[list[int], list[int]]] = [([], []) for _ in range(data.columns)]
    for k in range(len(data)):
        row = data[k]
        assert (row.segment, row.column) == divmod(k, data.columns)
        columns[row.column][0].extend(row.input_ids.tolist())
        columns[row.column][1].extend(row.shift_labels.tolist())
    return columns


def test_the_picture_of_the_docstring() -> None:
    data = StreamSegments(torch.arange(13), columns=2, segment_length=3)
    assert [row.input_ids.tolist() for row in data] == [[0, 1, 2], [6, 7, 8], [3, 4, 5], [9, 10, 11]]
    assert [row.shift_labels.tolist() for row in data] == [[1, 2, 3], [7, 8, 9], [4, 5, 6], [10, 11, 12]]


@given(st.integers(0, 80), st.integers(1, 7), st.integers(1, 9))
def test_a_kept_tail_makes_every_token_but_the_first_a_target_once(tokens: int, columns: int, length: int) -> None:
    if tokens <= columns:
        with pytest.raises(EmptyDataError, match=f"columns={columns}"):
            StreamSegments(torch.arange(tokens), columns, length, keep_tail=True)
        return
    data = StreamSegments(torch.arange(tokens), columns, length, keep_tail=True)
    targets = [target for _, column in read(data) for target in column if target != -100]
    assert targets == list(range(1, tokens))  # in order: columns are contiguous
    assert data.num_targets == tokens - 1
    for ids, column in read(data):
        assert all(target in (token + 1, -100) for token, target in zip(ids, column, strict=True))
        assert -100 not in column[:-1]  # lengths differ by at most one
    assert all(len(row.input_ids) == length for row in data if row.segment < data.segments - 1)


@given(st.integers(0, 80), st.integers(1, 7), st.integers(1, 9))
def test_without_tail_all_segments_are_full_and_only_the_end_is_lost(tokens: int, columns: int, length: int) -> None:
    if tokens <= columns * length:
        with pytest.raises(EmptyDataError, match=f"segment_length={length}"):
            StreamSegments(torch.arange(tokens), columns, length)
        return
    data = StreamSegments(torch.arange(tokens), columns, length)
    assert all(row.input_ids.shape == row.shift_labels.shape == (length,) for row in data)
    targets = [target for _, column in read(data) for target in column]
    assert targets == list(range(1, data.num_targets + 1))
    assert 0 <= tokens - 1 - data.num_targets < columns * length


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_streams_are_read_from_files_without_copying_them(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(100, dtype=dtype))
    data = StreamSegments(np.load(tmp_path / "tokens.npy", mmap_mode="r"), 3, 10)
    assert isinstance(data.tokens, np.memmap)
    row = data[4]
    assert row.input_ids.dtype == row.shift_labels.dtype == torch.int64
    assert row.input_ids.tolist() == list(range(40, 50)) and row.shift_labels.tolist() == list(range(41, 51))
    row.input_ids.fill_(0)  # a copy
    assert data[4].input_ids.any()


def test_refuses_what_is_no_stream() -> None:
    for tokens in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(9)):
        with pytest.raises(ValueError, match="tokens must be integers"):
            StreamSegments(tokens, 1, 1)
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        StreamSegments(torch.arange(9), 0, 1)
    with pytest.raises(IndexError):
        StreamSegments(torch.arange(9), 2, 2)[4]


def test_collator_says_where_in_the_stream_a_batch_is() -> None:
    data = StreamSegments(torch.arange(24), columns=4, segment_length=5, keep_tail=True)  # 23 targets: 6, 6, 6, 5
    batch = StreamCollator()([data[6], data[7]])
    assert batch["stream_columns"].tolist() == [2, 3] and batch["stream_segments"].tolist() == [1, 1]
    assert batch["input_ids"].tolist() == [[17], [23]]
    assert batch["shift_labels"].tolist() == [[18], [-100]] and batch["labels"].tolist() == [[17], [-100]]
    assert StreamCollator(positions=False)([data[0]]).keys() == {"input_ids", "labels", "shift_labels"}
    with pytest.raises(ValueError, match="mixes segments 0 to 1"):
        StreamCollator()([data[3], data[4]])


@pytest.mark.parametrize(("replicas", "batch", "columns"), [(1, 2, 6), (2, 1, 4), (2, 2, 4), (3, 2, 12), (2, 3, 12)])
def test_every_replica_keeps_its_own_columns(replicas: int, batch: int, columns: int) -> None:
    data = StreamSegments(torch.arange(1 + columns * 5 * 4), columns, 5)
    seen: dict[int, list[tuple[int, int]]] = {}
    for replica in range(replicas):
        batches = BatchSampler(SequentialSampler(data), batch, drop_last=True)
        shard = BatchSamplerShard(batches, replicas, replica)
        for rows in DataLoader(data, batch_sampler=shard, collate_fn=StreamCollator()):
            for column, segment in zip(rows["stream_columns"].tolist(), rows["stream_segments"].tolist(), strict=True):
                seen.setdefault(column, []).append((replica, segment))
    for column in range(columns):  # one replica, and every segment in its turn
        owner = seen[column][0][0]
        assert seen[column] == [(owner, segment) for segment in range(4)]


def arguments(folder: Path, kind: type = OuroborosArguments, **values: object):
    stream = {"train_sampling_strategy": "sequential", "dataloader_drop_last": True, "use_cpu": True, "report_to": []}
    return kind(output_dir=str(folder), **(stream | {"per_device_train_batch_size": 2} | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy='random'.*use 'sequential'"),
        ({"dataloader_drop_last": False}, "dataloader_drop_last=False"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size=4 on 1 replica.*columns=6.*multiple of 4"),
        ({"per_device_eval_batch_size": 4}, "per_device_eval_batch_size=4"),
    ],
)
def test_arguments_that_tear_a_stream_are_refused(tmp_path: Path, values: dict[str, object], message: str) -> None:
    data = StreamSegments(torch.arange(100), 6, 5)
    fitting = {"per_device_eval_batch_size": 3}
    check_stream_arguments(arguments(tmp_path, **fitting), data, data)
    with pytest.raises(UnsupportedOptionError, match=message):
        check_stream_arguments(arguments(tmp_path, **(fitting | values)), data, data)


def test_columns_of_replicas_are_checked(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.data_parallel_replicas = 4  # needs processes, as an option
    with pytest.raises(UnsupportedOptionError, match=r"on 4 replica\(s\) reads 8 columns"):
        check_stream_arguments(args, StreamSegments(torch.arange(100), 6, 5))
    args.accelerator_config.split_batches = True  # each gets a part of a batch
    check_stream_arguments(args, StreamSegments(torch.arange(100), 6, 5))


@pytest.mark.parametrize(
    ("kind", "trainer_class"), [(TrainingArguments, Trainer), (OuroborosArguments, OuroborosTrainer)]
)
def test_trainers_count_every_target_of_the_stream(tmp_path: Path, kind: type, trainer_class: type) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(11, (97,))
    config = GPT2Config(vocab_size=11, n_positions=6, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    data = StreamSegments(tokens, columns=4, segment_length=6, keep_tail=True)
    with torch.no_grad():  # what every target costs, each predicted from the beginning of its segment
        costs = []
        for row in data:
            log_probabilities = model(row.input_ids[None]).logits[0].log_softmax(-1)
            counted = row.shift_labels != -100
            costs.append(-log_probabilities[counted].gather(1, row.shift_labels[counted, None]).sum())
    expected = torch.stack(costs).sum() / 96

    args = arguments(tmp_path, kind, per_device_eval_batch_size=4, max_steps=2, gradient_accumulation_steps=2)
    seen: list[list[int]] = []

    class Watched(trainer_class):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append(inputs["input_ids"][:, 0].tolist())
            return super().training_step(model, inputs, num_items_in_batch)

    train = StreamSegments(tokens, columns=4, segment_length=6)
    check_stream_arguments(args, train, data)
    collator = StreamCollator(positions=False)
    trainer = Watched(model=model, args=args, train_dataset=train, eval_dataset=data, data_collator=collator)
    if trainer_class is OuroborosTrainer:  # the stock one averages over batches, which have 24 and 0 < n < 24 targets
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)
    trainer.train()
    starts = [row.input_ids[0].item() for row in train]
    assert seen == [starts[0:2], starts[2:4], starts[4:6], starts[6:8]]


def test_texts_to_a_stream() -> None:
    assert text_stream(["ab", "", "c"], byte_tokenizer()).tolist() == [97, 98, 256, 99]
    rows = datasets.Dataset.from_dict({"ids": [[1, 2], [], [3]]})
    assert tokenized_stream(rows, column="ids").tolist() == [1, 2, 3]
    assert tokenized_stream(rows, eos_id=0, column="ids").tolist() == [1, 2, 0, 3]
    with pytest.raises(MissingColumnError, match="no column 'input_ids'"):
        tokenized_stream(rows)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        text_stream(["a"], tokenizer)


def test_word_tokenizers_end_every_line() -> None:
    tokenizer = build_tokenizer(Vocabulary(["<eos>", "a", "b", "<unk>"]))
    text = " a b \n \n b x\n"  # a file of WikiText-103: blank lines are lines
    expected = [1, 2, 0, 0, 2, 3, 0]
    assert text_stream([text], tokenizer).tolist() == expected
    assert text_stream(text.split("\n")[:-1], tokenizer).tolist() == expected  # the same, a row per line
    long = text_stream(["a\n" * 25_001], tokenizer)
    assert long.tolist() == [1, 0] * 25_001
