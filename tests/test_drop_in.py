"""A fine-tuning script of the stock Trainer runs when only the class changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch.utils.data import IterableDataset
from trainer_helpers import (
    TRANSFORMERS,
    VOCABULARY,
    ExactTrainer,
    Rows,
    assert_same,
    common_options,
    complete_optimizer,
    logged,
    ouroboros,
    outcome,
    run_python,
    split_options,
    stock,
    tiny_model,
    trained,
)
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_ouroboros import OuroborosArguments, OuroborosTrainer

ONE = split_options(1, 1)


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of next tokens that are right."""
    found, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((found == labels)[labels != -100].mean())}


def best_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


# ---- the whole flow, with the stock arguments ----


@pytest.mark.parametrize("cls", [ExactTrainer, OuroborosTrainer])
def test_a_stock_script(tmp_path: Path, cls: type[Trainer]) -> None:
    args = TrainingArguments(
        **common_options(
            tmp_path,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            logging_first_step=True,
        )
    )
    trainer = cls(
        tiny_model(),
        args,
        train_dataset=Rows(18),
        eval_dataset=Rows(10, seed=1),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=best_tokens,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=5)],
    )
    result = trainer.train()
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    predictions = trainer.predict(Rows(7, seed=2))
    assert result.global_step == 6 and math.isfinite(result.training_loss)
    assert {"train_runtime", "train_loss", "epoch"} <= result.metrics.keys()
    assert {"eval_loss", "eval_accuracy", "eval_runtime", "epoch"} <= metrics.keys()
    assert metrics["eval_accuracy"] == trainer.state.best_metric
    assert predictions.predictions.shape == (7, 10)
    assert "test_accuracy" in predictions.metrics
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(dict(trainer.model.state_dict()), dict(loaded.state_dict()))


@pytest.mark.slow
def test_a_loaded_model_is_a_plain_one(tmp_path: Path) -> None:
    """In a process that has never heard of this package."""
    trainer = trained(tmp_path, max_steps=2)
    trainer.save_model()
    torch.save({name: v.clone() for name, v in trainer.model.state_dict().items()}, tmp_path / "weights.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = torch.load(sys.argv[1] + "/weights.pt")
assert all(torch.equal(expected[n], v) for n, v in model.state_dict().items())
assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, pad_token_id=0).shape[0] == 1
assert "hf_ouroboros" not in sys.modules
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_trained_model_is_an_ordinary_one(tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=2)
    model = trainer.model.eval()
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(p.grad is None and p.is_leaf and p.requires_grad for p in model.parameters())
    ids = Rows(3).ids
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.generate(ids[:, :3], max_new_tokens=4, pad_token_id=0).shape == (3, 7)


# ---- callbacks ----

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


def counting() -> tuple[TrainerCallback, Counter]:
    counts: Counter = Counter()

    def count(name: str) -> Any:
        def event(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counts[name] += 1

        return event

    return type("Counting", (TrainerCallback,), {name: count(name) for name in EVENTS})(), counts


@pytest.mark.parametrize("schedule", ["pipelined", "reference"])
def test_every_event_as_often_as_in_stock(tmp_path: Path, schedule: str) -> None:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
        "eval_on_start": True,
    }
    expected, expected_counts = counting()
    trainer = stock(tmp_path / "stock", {"callbacks": [expected]}, **options)
    trainer.train()
    trainer.predict(Rows(5))
    found, found_counts = counting()
    trainer = ouroboros(tmp_path / "found", {"callbacks": [found]}, schedule=schedule, **options)
    trainer.train()
    trainer.predict(Rows(5))
    assert found_counts == expected_counts
    assert found_counts["on_step_end"] == 6 and found_counts["on_substep_end"] == 4
    assert found_counts["on_optimizer_step"] == 6 and found_counts["on_save"] == 2


def test_callbacks_get_the_usual_things(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Looking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.update(kwargs)

    trainer = trained(tmp_path, {"callbacks": [Looking()]}, max_steps=1)
    assert seen["model"] is trainer.model
    assert seen["optimizer"].param_groups[0]["lr"] >= 0
    assert seen["lr_scheduler"] is trainer.lr_scheduler
    assert seen["train_dataloader"] is not None


def test_early_stopping(tmp_path: Path) -> None:
    class Worse:
        count = 0

        def __call__(self, prediction: Any) -> dict[str, float]:
            self.count += 1
            return {"score": -self.count}

    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
    }
    given = {"compute_metrics": Worse(), "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]}
    trainer = trained(tmp_path, given, **options)
    assert trainer.state.global_step == 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_stopping_in_the_middle(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    stopped = trained(tmp_path, {"callbacks": [Stop()]}, lr_scheduler_type="constant")
    shorter = trained(tmp_path, max_steps=4, lr_scheduler_type="constant")
    assert_same(outcome(shorter)["weights"], outcome(stopped)["weights"])
    assert len(logged(stopped, "train_loss")) == 1


# ---- evaluation ----


def brute_force(model: Any, rows: Rows) -> float:
    """Mean over all target tokens, one row at a time."""
    total, count = 0.0, 0
    model.eval()
    for i in range(len(rows)):
        row = {key: value.unsqueeze(0) for key, value in rows[i].items()}
        targets = row.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**row).logits[0, :-1]
        kept = targets != -100
        total += torch.nn.functional.cross_entropy(logits[kept].double(), targets[kept], reduction="sum").item()
        count += int(kept.sum())
    return total / count


@pytest.mark.parametrize("batch", [1, 4])
def test_eval_loss_is_the_mean_over_tokens(tmp_path: Path, batch: int) -> None:
    """Whatever the batches, whose padding differs; stock's mean over batches isn't."""
    trainer = ouroboros(tmp_path, per_device_eval_batch_size=batch)
    rows = Rows(10, seed=1)
    expected = brute_force(tiny_model(), rows)
    # float32 against float64
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.evaluate(rows, metric_key_prefix="mine")["mine_loss"] == pytest.approx(expected, rel=1e-6)


def test_eval_loss_during_and_after_training(tmp_path: Path) -> None:
    trainer = trained(tmp_path, eval_strategy="steps", eval_steps=3)
    last = logged(trainer, "eval_loss")[-1]
    assert last == pytest.approx(brute_force(trainer.model, Rows(10, seed=1)), rel=1e-6)  # float32 against float64
    assert trainer.evaluate()["eval_loss"] == last


def test_evaluation_is_stocks(tmp_path: Path) -> None:
    """Rows without padding and equal batches, where the two means agree."""

    class Plain(Rows):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.ids[index], "labels": self.ids[index]}

    given = {"eval_dataset": Plain(8), "compute_metrics": accuracy, "preprocess_logits_for_metrics": best_tokens}
    options = {"per_device_eval_batch_size": 4}
    expected = stock(tmp_path, dict(given), **options)
    found = ouroboros(tmp_path, given, **options)
    a, b = expected.evaluate(), found.evaluate()
    assert a.keys() - {"eval_model_preparation_time"} == b.keys() - {"eval_model_preparation_time"}
    assert a["eval_accuracy"] == b["eval_accuracy"]
    assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-6)  # summed in another order
    a, b = expected.predict(Rows(5)), found.predict(Rows(5))
    assert np.array_equal(a.predictions, b.predictions) and np.array_equal(a.label_ids, b.label_ids)


def test_predict_gives_logits(tmp_path: Path) -> None:
    trainer = ouroboros(tmp_path)
    found = trainer.predict(Rows(5))
    assert found.predictions.shape == (5, 10, VOCABULARY)
    rows = [Rows(5)[i] for i in range(4)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = tiny_model().eval()(**batch).logits.numpy()
    assert np.array_equal(found.predictions[:4], expected) or np.allclose(found.predictions[:4], expected, atol=1e-5)


def test_data_without_labels(tmp_path: Path) -> None:
    rows = [{"input_ids": row} for row in Rows(5).ids]
    found = ouroboros(tmp_path).predict(rows)
    assert found.label_ids is None and "test_loss" not in found.metrics
    assert found.predictions.shape == (5, 10, VOCABULARY)


def test_several_evaluation_sets(tmp_path: Path) -> None:
    sets = {"a": Rows(6, seed=1), "b": Rows(4, seed=2)}
    options = {"eval_strategy": "epoch", "metric_for_best_model": "eval_b_loss", "save_strategy": "epoch"}
    trainer = trained(tmp_path, {"eval_dataset": sets}, load_best_model_at_end=True, **options)
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        # float32 against float64
        assert metrics[f"eval_{name}_loss"] == pytest.approx(brute_force(trainer.model, rows), rel=1e-6)
    assert trainer.state.best_metric == min(logged(trainer, "eval_b_loss"))


def test_evaluation_before_training_changes_nothing(tmp_path: Path) -> None:
    trainer = ouroboros(tmp_path)
    trainer.evaluate()
    trainer.predict(Rows(3))
    trainer.train()
    assert_same(trained(tmp_path), trainer)


# ---- losses ----


def sum_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    if num_items_in_batch is None:
        return torch.nn.functional.cross_entropy(logits, targets)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


class SquaredTrainerMixin:
    """A script's own loss: mean over the batch, which Trainer has to divide by the micro-batches."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        loss = sum_loss(outputs, inputs["labels"]) + 1e-3 * outputs.logits.square().mean()
        self.loss_is_scaled_for_ga = False
        return (loss, outputs) if return_outputs else loss


LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: trainer arguments, options, class attributes
    "compute_loss_func": ({"compute_loss_func": sum_loss}, {}, {}),
    "label smoothing": ({}, {"label_smoothing_factor": 0.3}, {}),
    "own compute_loss": ({}, {}, {"mixin": SquaredTrainerMixin}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LOSSES)
def test_own_losses(tmp_path: Path, case: str) -> None:
    given, options, more = LOSSES[case]
    mixin = (more["mixin"],) if more else ()

    def arguments(base: type, dropout: float) -> dict[str, Any]:
        cls = type("Mixed", (*mixin, base), {})
        return given | {"cls": cls, "model": tiny_model(dropout=dropout)}

    if case != "own compute_loss" or TRANSFORMERS >= Version("5.21"):  # knows loss_is_scaled_for_ga from there on
        expected = stock(tmp_path, arguments(ExactTrainer, 0.0), **options)
        expected.train()
        found = trained(tmp_path, arguments(OuroborosTrainer, 0.0), schedule="pipelined", **ONE, **options)
        assert_same(expected, found)
        assert logged(found, "train_loss") == pytest.approx(logged(expected, "train_loss"), rel=1e-6)  # float32 sums
    pair = [
        trained(tmp_path, arguments(OuroborosTrainer, 0.1), schedule=schedule, **options)
        for schedule in ("reference", "pipelined")
    ]
    assert_same(*pair)
    assert pair[0].evaluate()["eval_loss"] == pair[1].evaluate()["eval_loss"]


# ---- optimizers ----


def one_cycle(model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=6, cycle_momentum=True)


def groups_and_plain_scheduler(model: Any) -> tuple[Any, Any]:
    layers = list(model.transformer.h.parameters())
    others = [p for p in model.parameters() if all(p is not q for q in layers)]
    groups = [{"params": layers, "lr": 1e-3}, {"params": others, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, amsgrad=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda i: 1 / (1 + i), lambda i: 0.5**i])


def without_scheduler(model: Any) -> tuple[Any, Any]:
    return torch.optim.NAdam(model.parameters(), lr=1e-2), None


@pytest.mark.slow
@pytest.mark.parametrize("make", [one_cycle, groups_and_plain_scheduler, without_scheduler], ids=lambda f: f.__name__)
def test_own_optimizers(tmp_path: Path, make: Any) -> None:
    def arguments(dropout: float) -> dict[str, Any]:
        model = tiny_model(dropout=dropout)
        return {"model": model, "optimizers": make(model)}

    expected = stock(tmp_path, arguments(0.0))
    expected.train()
    found = trained(tmp_path, arguments(0.0), **ONE)
    assert_same(outcome(expected)["weights"], outcome(found)["weights"])
    assert logged(found, "learning_rate") == logged(expected, "learning_rate")
    reference = trained(tmp_path, arguments(0.1), schedule="reference")
    given = arguments(0.1)
    pipelined = trained(tmp_path, given)
    assert_same(outcome(reference)["weights"], outcome(pipelined)["weights"])
    assert complete_optimizer(pipelined) is given["optimizers"][0]


@pytest.mark.slow
def test_optimizer_cls_and_kwargs(tmp_path: Path) -> None:
    given = {"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 1e-3})}
    pair = [trained(tmp_path, dict(given), schedule=schedule) for schedule in ("reference", "pipelined")]
    assert_same(*pair)
    assert isinstance(complete_optimizer(pair[1]), torch.optim.RMSprop)


@pytest.mark.slow
def test_an_optimizer_of_a_part(tmp_path: Path) -> None:
    """Only the last blocks are trained."""

    def arguments() -> dict[str, Any]:
        model = tiny_model()
        return {"model": model, "optimizers": (torch.optim.SGD(model.transformer.h[3:].parameters(), lr=0.1), None)}

    pair = [trained(tmp_path, arguments(), schedule=schedule) for schedule in ("reference", "pipelined")]
    assert_same(outcome(pair[0])["weights"], outcome(pair[1])["weights"])
    assert torch.equal(pair[1].model.transformer.wte.weight, tiny_model().transformer.wte.weight)


# ---- data ----


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rows = Rows(18)
        return (rows[i] for i in range(len(rows)))


@pytest.mark.slow
def test_iterable_dataset(tmp_path: Path) -> None:
    """Trainer sees the end of such data only when it is there: an update may go on over it."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    expected = stock(tmp_path / "stock", {"train_dataset": Stream()}, **options)
    expected.train()
    given = {"train_dataset": Stream(), "model": tiny_model(dropout=0.0)}
    assert_same(expected, trained(tmp_path / "one", given, **ONE, **options))
    pair = [
        trained(tmp_path / schedule, {"train_dataset": Stream()}, schedule=schedule, **options)
        for schedule in ("reference", "pipelined")
    ]
    assert_same(*pair)
    # Trainer finds its place again within the first pass over such data, not later.
    checkpoint = tmp_path / "pipelined" / "checkpoint-2"
    assert_same(pair[0], trained(tmp_path / "again", {"train_dataset": Stream()}, resume=checkpoint, **options))


def test_saving_where_an_epoch_ends_within_an_update(tmp_path: Path) -> None:
    """Five micro-batches, two per update, no length: the epoch ends before the update does."""
    trained(tmp_path, {"train_dataset": Stream()}, max_steps=8, save_strategy="epoch")
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", [True, "non_padding"])
def test_input_tokens_are_counted(tmp_path: Path, kind: Any) -> None:
    expected = stock(tmp_path, include_num_input_tokens_seen=kind)
    expected.train()
    found = trained(tmp_path, include_num_input_tokens_seen=kind)
    assert found.state.num_input_tokens_seen == expected.state.num_input_tokens_seen > 0
    assert logged(found, "num_input_tokens_seen") == logged(expected, "num_input_tokens_seen")


def test_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = Rows(18)
    columns = {"input_ids": rows.ids.tolist(), "labels": rows.ids.tolist(), "text": ["not a tensor"] * 18}
    trainer = trained(tmp_path, {"train_dataset": datasets.Dataset.from_dict(columns)})
    assert trainer.state.global_step == 6


@pytest.mark.slow
def test_dropped_last_batch_and_workers(tmp_path: Path) -> None:
    options = {"dataloader_drop_last": True, "gradient_accumulation_steps": 4, "num_train_epochs": 3}
    pair = [trained(tmp_path, schedule=schedule, **options) for schedule in ("reference", "pipelined")]
    assert_same(*pair)
    assert pair[0].state.global_step == 3


# ---- models ----


@pytest.mark.slow
def test_model_init(tmp_path: Path) -> None:
    """A new model for every train(), split anew."""
    trainer = ouroboros(tmp_path, {"model_init": lambda: tiny_model()})
    first = trainer.model
    trainer.evaluate()
    trainer.train()
    assert trainer.model is not first
    assert_same(trained(tmp_path), trainer)
    second = trainer.model
    trainer.train()
    assert trainer.model is not second
    assert_same(trained(tmp_path), trainer)
    trainer.evaluate()


@pytest.mark.slow
def test_model_init_resumes(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    expected = trained(tmp_path, {"model_init": lambda: tiny_model()}, **options)
    found = trained(tmp_path / "b", {"model_init": lambda: tiny_model()}, resume=tmp_path / "checkpoint-3", **options)
    assert_same(expected, found)


@pytest.mark.slow
def test_training_twice(tmp_path: Path) -> None:
    """The second train() goes on with weights and optimizer of the first, as in stock."""
    expected = stock(tmp_path, max_steps=3)
    found = ouroboros(tmp_path, {"model": tiny_model(dropout=0.0)}, max_steps=3, **ONE)
    pair = [ouroboros(tmp_path, max_steps=3, schedule=schedule) for schedule in ("reference", "pipelined")]
    for trainer in (expected, found, *pair):
        trainer.train()
        trainer.train()
    assert_same(expected, found)
    assert_same(*pair)


def test_two_trainers_at_once(tmp_path: Path) -> None:
    """One trains in a callback of the other."""
    inner = ouroboros(tmp_path)

    class Nested(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.epoch == 1:
                inner.train()

    outer = trained(tmp_path, {"callbacks": [Nested()]})
    assert_same(outcome(outer)["weights"], outcome(inner)["weights"])


def test_no_arguments_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = OuroborosTrainer(tiny_model(), train_dataset=Rows(4))
    assert isinstance(trainer.args, OuroborosArguments)
    assert trainer.args.output_dir.endswith("tmp_trainer")


def test_parameters_given_by_position(tmp_path: Path) -> None:
    """The signature is Trainer's."""
    import inspect

    found, expected = (list(inspect.signature(cls.__init__).parameters) for cls in (OuroborosTrainer, Trainer))
    assert found == expected


def test_total_flos_and_speed(tmp_path: Path) -> None:
    expected = stock(tmp_path)
    expected.train()
    found = trained(tmp_path)
    assert found.state.total_flos == expected.state.total_flos
    keys = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss", "epoch"}
    assert keys <= found.state.log_history[-1].keys()


def test_not_a_number_is_filtered_as_in_stock(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return sum_loss(outputs, labels, num_items_in_batch) * (float("nan") if labels[0, 0] % 5 == 0 else 1.0)

    options = {"learning_rate": 0.0, "optim": "sgd", "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    trainer = trained(tmp_path, {"compute_loss_func": loss}, logging_nan_inf_filter=True, max_steps=5, **options)
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    assert math.isfinite(logged(trainer, "train_loss")[0])
