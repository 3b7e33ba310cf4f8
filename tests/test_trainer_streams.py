"""OuroborosTrainer on a Transformer-XL that reads streams: numbers, evaluation, resuming, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_helpers import CUT, tiny_xl
from stream_trainer_helpers import StreamRows, stream_trainer, trained_on_stream
from trainer_helpers import (
    AtStep,
    assert_same,
    common_options,
    logged,
    ouroboros,
    outcome,
    split_options,
    stock,
    tiny_model,
)

from hf_ouroboros import OuroborosArguments, OuroborosTrainer, UnsupportedOptionError
from hf_ouroboros.errors import StreamError
from hf_ouroboros.models.transfo_xl import TransfoXLLMHeadModel
from hf_ouroboros.models.transfo_xl.adaptive import AdaptiveSoftmax

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "eval_mem_len": 11, "eval_clamp_len": 4}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The reference, with a checkpoint after each of its 12 updates of 2 micro-batches, which split the columns."""
    folder = tmp_path_factory.mktemp("written")
    options = {"schedule": "reference", "save_strategy": "steps", "save_steps": 1, **split_options(3, 2)}
    return folder, outcome(trained_on_stream(folder, **options))


# ---- training ----


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep", "reference"])
def test_evaluation_in_the_middle_changes_nothing(tmp_path: Path, uninterrupted: Any, schedule: str) -> None:
    found = trained_on_stream(tmp_path, schedule=schedule, **split_options(3, 2), **EVALUATED)
    assert_same(uninterrupted[1], found)
    assert len(set(logged(found, "eval_loss"))) == 12


@pytest.mark.slow
@pytest.mark.parametrize(("step", "schedule"), [(1, "lockstep"), (4, "pipelined"), (6, "pipelined"), (9, "reference")])
def test_resumes_within_an_epoch_under_another_schedule(
    tmp_path: Path, uninterrupted: Any, step: int, schedule: str
) -> None:
    folder, expected = uninterrupted
    options = {"schedule": schedule, **split_options(3, 2)}
    assert_same(expected, trained_on_stream(tmp_path, resume=folder / f"checkpoint-{step}", **options))


@pytest.mark.slow
def test_a_pipelined_checkpoint_resumes(tmp_path: Path, uninterrupted: Any) -> None:
    options = {"save_strategy": "steps", "save_steps": 5, "recompute": True, **split_options(3, 2)}
    assert_same(uninterrupted[1], trained_on_stream(tmp_path, **options))
    assert_same(uninterrupted[1], trained_on_stream(tmp_path, resume=tmp_path / "checkpoint-5", **options))


@pytest.mark.slow
def test_without_places_nothing_is_remembered(tmp_path: Path) -> None:
    """One stage is the stock Trainer on the ordinary model, to the last bit."""

    class Rows(StreamRows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {key: value for key, value in super().__getitem__(index).items() if not key.startswith("stream")}

    def given() -> dict[str, Any]:
        return {"model": tiny_xl(**CUT), "train_dataset": Rows(), "eval_dataset": Rows(seed=1)}

    class Kept(Rows):
        """The stock Trainer removes what the model's forward doesn't name."""

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = super().__getitem__(index)
            return {"input_ids": row["input_ids"], "labels": row["labels"]}

    kept = {"train_dataset": Kept(), "eval_dataset": Kept(seed=1)}
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.7}
    expected = stock(tmp_path / "stock", given() | kept, **options)
    expected.train()
    found = ouroboros(tmp_path / "found", given() | kept, **options, **split_options(1, 1))
    found.train()
    assert_same(expected, found)
    # Trainer weighs batches by rows; with rows of one length that is the mean over targets.
    assert math.isclose(expected.evaluate()["eval_loss"], found.evaluate()["eval_loss"], rel_tol=1e-6)
    shifted = ouroboros(tmp_path / "shifted", given(), **options, **split_options(1, 1))
    shifted.train()
    assert logged(shifted, "loss") != logged(found, "loss")  # shift_labels were kept, and have a target more per row


@pytest.mark.slow
def test_logits_are_built_only_for_those_who_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def seen(self: AdaptiveSoftmax, hidden: torch.Tensor) -> torch.Tensor:
        shapes.append(hidden.shape)
        return log_probabilities(self, hidden)

    log_probabilities = AdaptiveSoftmax._log_probabilities
    trainer = stream_trainer(tmp_path, num_train_epochs=1, **split_options(3, 2))
    monkeypatch.setattr(AdaptiveSoftmax, "_log_probabilities", seen)
    trainer.train()
    trainer.evaluate()
    assert shapes == []
    predicted = trainer.predict(StreamRows(seed=1)).predictions
    assert predicted.shape == (24, 5, 19) and len(shapes) == 12
    torch.testing.assert_close(torch.from_numpy(predicted).exp().sum(-1), torch.ones(24, 5))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["smoothing", "function", "method"])
def test_other_losses_get_log_probabilities(tmp_path: Path, how: str) -> None:
    given: dict[str, Any] = {}
    options: dict[str, Any] = {"num_train_epochs": 1}
    if how == "smoothing":
        options["label_smoothing_factor"] = 0.1
    if how == "function":
        given["compute_loss_func"] = summed
    if how == "method":
        given["cls"] = OwnLoss
    found = [
        stream_trainer(tmp_path / schedule, dict(given), schedule=schedule, **options, **split_options(3, 2))
        for schedule in ("reference", "pipelined")
    ]
    for trainer in found:
        trainer.train()
    assert_same(*found)
    if how == "smoothing":
        trainer = stream_trainer(tmp_path, {"model": tiny_xl(**CUT)}, label_smoothing_factor=0.1, max_steps=1)
        trainer.train()
        output = tiny_xl(**CUT).train()
        ids = StreamRows().ids[:, :5]
        with torch.no_grad():
            scores = output(ids, return_logits=True).logits[:, :-1]
        wanted = 0.9 * scores.gather(-1, ids[:, 1:, None])[..., 0] + 0.1 * scores.mean(-1)
        assert math.isclose(logged(trainer, "train_loss")[0], -wanted.sum() / 20, rel_tol=1e-5)


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return -outputs.logits.gather(-1, labels[..., None]).sum() / num_items_in_batch


class OwnLoss(OuroborosTrainer):
    """A trainer whose loss is its own."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = summed(outputs, inputs["shift_labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


# ---- evaluation ----


def by_hand(model: TransfoXLLMHeadModel, rows: StreamRows, carried: bool = True) -> float:
    """Mean loss over all targets, two columns at a time."""
    total = count = 0.0
    mems: dict[int, Any] = {}
    with torch.no_grad():
        for start in range(0, len(rows), 2):
            batch = [rows[start], rows[start + 1]]
            ids, targets = (torch.stack([row[key] for row in batch]) for key in ("input_ids", "shift_labels"))
            column = batch[0]["stream_columns"]
            output = model(ids, shift_labels=targets, mems=mems.get(column) if carried else None)
            mems[column] = output.mems
            total += output.loss.item() * targets.numel()
            count += targets.numel()
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(("mem_len", "clamp_len"), [(None, None), (12, 4), (3, None), (0, 0)])
def test_evaluates_a_stream_with_its_memories(
    tmp_path: Path, stages: int, mem_len: int | None, clamp_len: int | None
) -> None:
    """As the ordinary model does with this memory, with the ragged end of the stream."""
    rows = StreamRows(seed=1, segments=5, tail=2)
    changed = {k: v for k, v in (("mem_len", mem_len), ("clamp_len", clamp_len)) if v is not None}
    expected = tiny_xl(**{**CUT, "same_length": True, **changed}).eval()
    trainer = stream_trainer(
        tmp_path,
        {"model": tiny_xl(same_length=True, **CUT), "eval_dataset": rows},
        eval_mem_len=mem_len,
        eval_clamp_len=clamp_len,
        **split_options(stages, max(1, stages - 1)),
    )
    for _ in range(2):  # each evaluation starts fresh
        assert math.isclose(trainer.evaluate()["eval_loss"], by_hand(expected, rows), rel_tol=1e-6)
    if mem_len is None:
        assert not math.isclose(by_hand(expected, rows), by_hand(expected, rows, carried=False), rel_tol=1e-4)
    assert all(stage.config is trainer.model.config for stage in trainer._partition.stages)


@pytest.mark.slow
def test_options_are_put_back_if_evaluation_fails(tmp_path: Path) -> None:
    class Broken(StreamRows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return super().__getitem__(index if index < 10 else 0)

    trainer = stream_trainer(tmp_path, {"eval_dataset": Broken(seed=1)}, eval_mem_len=12, **split_options(3, 2))
    with pytest.raises(StreamError, match="columns 0, 0, but must be one segment of consecutive columns"):
        trainer.evaluate()
    assert all(stage.config is trainer.model.config for stage in trainer._partition.stages)
    trainer.train()


# ---- refusals ----


def test_shuffled_rows_are_refused(tmp_path: Path) -> None:
    trainer = stream_trainer(tmp_path, train_sampling_strategy="random", **split_options(3, 2))
    with pytest.raises(StreamError, match="train_sampling_strategy='sequential', dataloader_drop_last=True"):
        trainer.train()


def test_batches_that_do_not_divide_the_columns_are_refused(tmp_path: Path) -> None:
    trainer = stream_trainer(tmp_path, per_device_train_batch_size=3, **split_options(3, 2))
    with pytest.raises(
        StreamError, match="a per-device batch size that, times the replicas, divides the stream's columns"
    ):
        trainer.train()


def test_gpt2_ignores_places_and_has_no_memory_options(tmp_path: Path) -> None:
    options = {"train_sampling_strategy": "random", "num_train_epochs": 1, **split_options(3, 2)}
    stream_trainer(tmp_path, {"model": tiny_model()}, **options).train()
    for option in ("eval_mem_len", "eval_clamp_len"):
        with pytest.raises(UnsupportedOptionError, match=f"{option}=5: a gpt2 model has no memory"):
            ouroboros(tmp_path, **{option: 5})


def test_negative_memory(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match=r"eval_mem_len=-1 must be a whole number from 0"):
        OuroborosArguments(**common_options(tmp_path, eval_mem_len=-1))


@pytest.mark.slow
def test_synchronized_callbacks_see_the_model(tmp_path: Path, uninterrupted: Any) -> None:
    """Calling the ordinary model in a callback, with memories of its own, changes nothing."""
    trainer = stream_trainer(tmp_path, **split_options(3, 2))
    rows = StreamRows(seed=3)

    def look() -> None:
        trainer.synchronize()
        by_hand(trainer.model.eval(), rows)

    trainer.add_callback(AtStep(None, look))
    trainer.train()
    assert_same(uninterrupted[1], trainer)
