"""OuroborosTrainer over processes: the reference's numbers, metrics of the whole, and checkpoints that cross over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from rig import in_processes
from trainer_helpers import Rows, differing, split_options
from trainer_runs import (
    Stream,
    accuracy,
    fresh_model,
    large_loss,
    made,
    most_likely,
    run_all,
    run_here,
    sum_of_losses,
    train_part,
    whole,
)
from transformers import AutoModelForCausalLM, EarlyStoppingCallback

from hf_ouroboros import CheckpointError, OuroborosError

EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "per_device_eval_batch_size": 3,
    "include_num_input_tokens_seen": "all",
    "save_total_limit": 3,
    "learning_rate": 3e-2,
}
METRICS = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": most_likely}


def assert_equal(expected: dict[str, Any], found: dict[str, Any], *keys: str) -> None:
    for key in keys or ("weights", "optimizer", "groups", "scheduler", "step", "flos", "tokens"):
        assert differing(expected[key], found[key]) == [], key


def evaluations(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in result["log"] if any(key.startswith("eval_") for key in entry)]


def mean_loss(result: dict[str, Any]) -> float:
    return next(entry["train_loss"] for entry in reversed(result["log"]) if "train_loss" in entry)


@pytest.mark.slow
def test_equals_the_reference(tmp_path: Path) -> None:
    runs = [{"options": {"schedule": s, "num_stages": 3}, "name": s} for s in ("pipelined", "lockstep")]
    expected = run_here(tmp_path, {"options": {"schedule": "reference", **split_options(3, 2)}, "name": "reference"})
    for found in run_all(tmp_path, 2, runs):
        assert_equal(expected, found)
        assert found["log"] == expected["log"]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_evaluation_and_best_model(tmp_path: Path, tied: bool) -> None:
    """Untied, the last stage and the main process are different ones."""
    run = {"options": EVALUATED, "trainer": METRICS, "model": {"tied": tied}, "predict": 7, "save": True}
    stages = 2 + tied
    expected = run_here(tmp_path, {**run, "options": EVALUATED | split_options(stages, 2), "name": "threads"})
    parts = in_processes(2, train_part, str(tmp_path), [{**run, "name": "processes"}])
    found = whole([part[0] for part in parts])
    assert_equal(expected, found)
    assert evaluations(found) == evaluations(expected) and len(evaluations(found)) == 3
    assert found["best"] == expected["best"].replace("threads", "processes")
    assert numpy.array_equal(found["predictions"], expected["predictions"])
    assert numpy.array_equal(found["labels"], expected["labels"])
    assert all(part[0]["metrics"] == expected["metrics"] for part in parts)
    for folder in ("", *(path.name for path in (tmp_path / "threads").glob("checkpoint-*"))):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "processes" / folder).state_dict()
        assert differing(AutoModelForCausalLM.from_pretrained(tmp_path / "threads" / folder).state_dict(), saved) == []
    assert len(list((tmp_path / "processes").glob("model-*-of-00002.safetensors"))) == 2
    assert not list((tmp_path / "processes").rglob(".*"))


@pytest.mark.slow
def test_what_else_a_script_may_use(tmp_path: Path) -> None:
    """Model and optimizer of the script's own, label smoothing, own losses, early stopping, data without a length."""
    early = {**EVALUATED, "num_train_epochs": 8, "learning_rate": 0.3, "eval_steps": 1, "save_steps": 1}
    runs: dict[str, dict[str, Any]] = {
        "model_init": {"trainer": {"model_init": fresh_model}},
        "optimizer": {"sgd": True},
        "smoothed": {"options": {"label_smoothing_factor": 0.1}},
        "own loss": {"trainer": {"compute_loss_func": sum_of_losses}},
        "early": {"options": early, "trainer": {**METRICS, "callbacks": [EarlyStoppingCallback(1)]}},
        "stream": {"trainer": {"train_dataset": Stream(18)}, "options": {"max_steps": 4}},
        "bf16": {"options": {"bf16": True}},
        "schedule": {"options": {"lr_scheduler_type": "cosine", "max_grad_norm": 0.1, "delay_warmup_steps": 2}},
    }
    over = [{**run, "options": {"num_stages": 3} | run.get("options", {}), "name": f"p {n}"} for n, run in runs.items()]
    found = dict(zip(runs, run_all(tmp_path, 2, over), strict=True))
    for name, run in runs.items():
        here = {**run, "options": split_options(3, 2) | run.get("options", {}), "name": f"t {name}"}
        expected = run_here(tmp_path, here)
        assert_equal(expected, found[name], "weights", "optimizer", "scheduler", "step", "flos")
    assert found["early"]["step"] < 24


@pytest.mark.slow
def test_checkpoints_cross_over(tmp_path: Path) -> None:
    """A run over processes goes on in threads, and the other way round; in the middle of an epoch, with dropout."""
    saving = {"save_strategy": "steps", "save_steps": 2, "num_stages": 3}
    threads = {"options": saving | split_options(3, 2), "name": "threads"}
    expected = run_here(tmp_path, threads)
    processes = {"options": saving, "name": "processes"}
    resumed = {"options": saving, "name": "resumed", "resume": str(tmp_path / "threads" / "checkpoint-2")}
    again = {"options": saving, "name": "again", "resume": str(tmp_path / "processes" / "checkpoint-4")}
    for found in run_all(tmp_path, 2, [processes, resumed, again]):
        assert_equal(expected, found)
    for step in (2, 4):
        resume = str(tmp_path / "processes" / f"checkpoint-{step}")
        assert_equal(expected, run_here(tmp_path, {**threads, "name": f"back-{step}", "resume": resume}))


@pytest.mark.slow
def test_checkpoints_of_weights_of_now_cross_over(tmp_path: Path) -> None:
    """What pending backwards need is in the files of all processes; with M = 1 and dropout, over three stages and more."""
    now = {
        "weights": "now",
        "gradient_accumulation_steps": 1,
        "max_steps": 7,
        "num_stages": 4,
        "eval_strategy": "steps",
    }
    saving = now | {"save_strategy": "steps", "save_steps": 2, "eval_steps": 3}
    threads = {"options": saving | split_options(4, 3), "name": "threads"}
    expected = run_here(tmp_path, threads)
    processes = {"options": saving, "name": "processes"}
    resumed = {"options": saving, "name": "resumed", "resume": str(tmp_path / "threads" / "checkpoint-2")}
    for found in run_all(tmp_path, 3, [processes, resumed]):
        assert_equal(expected, found)
    resume = str(tmp_path / "processes" / "checkpoint-4")
    assert_equal(expected, run_here(tmp_path, {**threads, "name": "back", "resume": resume}))


@pytest.mark.slow
def test_checkpoints_of_scaled_losses_cross_over(tmp_path: Path) -> None:
    """All processes know the scale, and what has overflowed of which nothing was made yet; and the scheduler what was skipped."""
    saving = {
        "fp16": True,
        "num_stages": 3,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "no",
    }
    given: dict[str, Any] = {"trainer": {"compute_loss_func": large_loss}}
    threads = given | {"options": saving | split_options(3, 2), "name": "threads"}
    synchronous = {"schedule": "1f1b", "optim": "adamw_torch", "max_steps": 4}
    expected = run_here(tmp_path, threads)
    other = run_here(tmp_path, threads | {"options": threads["options"] | synchronous, "name": "threads 1f1b"})
    processes = given | {"options": saving, "name": "processes"}
    resumed = given | {"options": saving, "name": "resumed", "resume": str(tmp_path / "threads" / "checkpoint-3")}
    runs = [processes, resumed, given | {"options": saving | synchronous, "name": "processes 1f1b"}]
    *found, last = run_all(tmp_path, 2, runs)
    for result in found:
        assert_equal(expected, result)
    assert_equal(other, last)
    assert other["scheduler"]["last_epoch"] < 4
    reported = [entry["skipped_updates"] for entry in expected["log"] if "skipped_updates" in entry]
    assert set(reported) == {0, 1} and found[0]["log"] == expected["log"]
    resume = str(tmp_path / "processes" / "checkpoint-6")
    assert_equal(expected, run_here(tmp_path, {**threads, "name": "back", "resume": resume}))


@pytest.mark.slow
def test_replicas_of_weights_of_now(tmp_path: Path) -> None:
    """A resumed run equals the uninterrupted one; with another number of replicas there is nothing to take the mean of."""
    options = {
        "num_stages": 3,
        "weights": "now",
        "data_parallel_replicas": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    saved = {"options": options, "trainer": {"train_dataset": Rows(16)}, "name": "saved"}
    found = run_all(tmp_path, 4, [saved, {**saved, "name": "on", "resume": str(tmp_path / "saved" / "checkpoint-2")}])
    assert_equal(*found)
    one = {**saved, "options": {**options, "data_parallel_replicas": 1, **split_options(3, 2)}, "name": "one"}
    with pytest.raises(CheckpointError, match="2 replicas with weights='now'.*resume with data_parallel_replicas=2"):
        run_here(tmp_path, {**one, "resume": str(tmp_path / "saved" / "checkpoint-2")})


@pytest.mark.slow
def test_replicas(tmp_path: Path) -> None:
    """Two replicas of two devices: the numbers of one replica with twice the batch; a resumed run equals itself."""
    common = {
        "num_stages": 3,
        "optim": "sgd",
        "num_train_epochs": 2,
        **{k: EVALUATED[k] for k in EVALUATED if "eval" in k},
    }
    common |= {"load_best_model_at_end": False, "metric_for_best_model": None, "include_num_input_tokens_seen": "all"}
    model = {"dropout": 0.0}
    here = {"options": common | split_options(3, 2) | {"per_device_train_batch_size": 4}, "model": model}
    expected = run_here(
        tmp_path, {**here, "trainer": METRICS | {"train_dataset": Rows(16)}, "name": "one", "predict": 7}
    )
    options = common | {"per_device_train_batch_size": 2, "data_parallel_replicas": 2}
    two = {"options": options, "model": model, "trainer": METRICS | {"train_dataset": Rows(16)}, "predict": 7}
    saving = {"save_strategy": "steps", "save_steps": 1}
    runs = [
        {**two, "name": "two"},
        {**two, "options": options | saving | {"optim": "adamw_torch"}, "model": {}, "name": "saved"},
        {
            **two,
            "options": options | saving | {"optim": "adamw_torch"},
            "model": {},
            "name": "resumed",
            "resume": str(tmp_path / "saved" / "checkpoint-2"),
        },
    ]
    found, saved, resumed = run_all(tmp_path, 4, runs)
    # The replicas' halves are summed in another order than the rows of one batch.
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-6)
    assert (found["step"], found["tokens"], found["flos"]) == (expected["step"], expected["tokens"], expected["flos"])
    assert math.isclose(mean_loss(found), mean_loss(expected), rel_tol=1e-5)
    for a, b in zip(evaluations(found), evaluations(expected), strict=True):
        assert math.isclose(a["eval_loss"], b["eval_loss"], rel_tol=1e-5) and a["eval_targets"] == b["eval_targets"]
    assert numpy.array_equal(found["labels"], expected["labels"])
    assert_equal(saved, resumed)
    # Half of the replicas go on from there: other micro-batches, but nothing is lost.
    one = {**two, "options": common | saving | split_options(3, 2) | {"optim": "adamw_torch"}, "model": {}}
    on = run_here(tmp_path, {**one, "name": "half", "resume": str(tmp_path / "saved" / "checkpoint-2")})
    assert on["step"] == 4


def refusals(rank: int, folder: str, cases: list[tuple[dict[str, Any], str]]) -> None:
    for options, words in cases:
        with pytest.raises(OuroborosError, match=words):
            made(folder, {"options": options})


@pytest.mark.slow
def test_refused_over_processes(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"schedule": "reference"}, "schedule='reference' is one device by definition"),
        ({"data_parallel_replicas": 2}, "data_parallel_replicas=2 does not divide the 3 process"),
        ({"save_on_each_node": True}, "save_on_each_node=True"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"device_map": {"": 0}}, "the device map uses 1 of 3 devices"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
    ]
    in_processes(3, refusals, str(tmp_path), cases)
