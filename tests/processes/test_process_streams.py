"""Memories where every device is a process: the reference's numbers, evaluation, checkpoints that cross over."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import reference_result, run_all
from helpers import differences
from rig import in_processes
from stream_helpers import CUT, CUT_ONE_TABLE, StreamCase, tiny_xl
from stream_trainer_helpers import OPTIONS, StreamRows
from trainer_helpers import common_options, differing, split_options
from trainer_runs import run_all as run_trainers
from trainer_runs import run_here
from transformers import AutoModelForCausalLM, set_seed

from hf_ouroboros import AutoStagedModelForCausalLM, OuroborosArguments, OuroborosTrainer, UnsupportedModelError
from hf_ouroboros.checkpoint import STATE_META

XL = {"dropout": 0.1, "same_length": True, **CUT}
SAVING = {"num_stages": 3, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("stages", [3, 4])
def test_equals_the_reference(stages: int) -> None:
    cases = [
        StreamCase(stages, updates=(1,) * 6, dropout=0.1, epoch=4, config=CUT),
        StreamCase(stages, updates=(2,) * 4, dropout=0.1, groups=2, config=CUT_ONE_TABLE, recompute=True, clip=0.5),
    ]
    runs = [(cases[0], "pipelined", {2: "settle"}), (cases[1], "pipelined", {1: "state"}), (cases[0], "lockstep", {})]
    runs.append((StreamCase(stages, updates=(1,) * 5, tied_gradient="paper", config=CUT), "lockstep", {}))
    for found, run in zip(run_all(stages - 1, runs), runs, strict=True):
        assert differences(reference_result(*run), found) == [], run


@pytest.mark.slow
def test_replicas_keep_their_columns() -> None:
    case = StreamCase(3, updates=(2, 2, 1), groups=2, rows=4, config=CUT, optimizer="sgd")
    expected = reference_result(case, "pipelined", {})
    (found,) = run_all(4, [(case, "pipelined", {})], replicas=2)
    # The replicas' halves are summed in another order than the rows of one batch.
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-6)
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found["losses"], expected["losses"], strict=True))


@pytest.mark.slow
def test_trainer_evaluates_and_crosses_over(tmp_path: Path) -> None:
    """Threads and processes give the same losses in evaluation, and go on from each other's checkpoints."""
    options = SAVING | {"eval_mem_len": 11, "eval_clamp_len": 4}
    threads = {"stream": XL, "options": options | split_options(3, 2), "name": "threads"}
    expected = run_here(tmp_path, threads)
    processes = {"stream": XL, "options": options, "name": "processes"}
    resumed = {**processes, "name": "resumed", "resume": str(tmp_path / "threads" / "checkpoint-3")}
    for found in run_trainers(tmp_path, 2, [processes, resumed]):
        assert differing(expected["weights"], found["weights"]) == []
        assert differing(expected["optimizer"], found["optimizer"]) == []
        assert evaluations(found) == evaluations(expected)
    again = {**threads, "name": "again", "resume": str(tmp_path / "processes" / "checkpoint-9")}
    assert differing(expected["weights"], run_here(tmp_path, again)["weights"]) == []


def evaluations(result: dict[str, Any]) -> list[float]:
    return [entry["eval_loss"] for entry in result["log"] if "eval_loss" in entry]


@pytest.mark.slow
def test_another_number_of_replicas(tmp_path: Path) -> None:
    """Two replicas with two columns each, or one with four: the same update, also from each other's checkpoints on."""
    common = {"optim": "sgd", "learning_rate": 0.3, "save_strategy": "steps", "save_steps": 2, "num_stages": 3}
    common |= {"gradient_accumulation_steps": 1, "num_train_epochs": 2}
    one = {"stream": CUT, "options": common | split_options(3, 2) | {"per_device_train_batch_size": 4}, "name": "one"}
    expected = run_here(tmp_path, one)
    two = {"stream": CUT, "options": common | {"data_parallel_replicas": 2}, "name": "two"}
    on = {**two, "name": "on", "resume": str(tmp_path / "one" / "checkpoint-2")}
    results = run_trainers(tmp_path, 4, [two, on])
    for folder in ("two", "on"):  # of "on", each replica still holds what was the other's at the change
        back = {**one, "name": f"back from {folder}", "resume": str(tmp_path / folder / "checkpoint-4")}
        results.append(run_here(tmp_path, back))
    for found in results:
        assert found["step"] == 12
        # The replicas' halves are summed in another order than the rows of one batch.
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-6)
    manifest = json.loads((tmp_path / "on" / "checkpoint-4" / STATE_META).read_text())
    assert {part["replica"]: part["streams"] for part in manifest["parts"]} == {
        0: {"0": [2, 4], "2": [2, 2]},
        1: {"0": [2, 2], "2": [2, 4]},
    }


def make(rank: int, folder: str, saved: str) -> tuple[dict, dict]:
    args = OuroborosArguments(**common_options(folder, num_stages=3, **OPTIONS))
    loaded = AutoStagedModelForCausalLM.from_pretrained(saved, args=args)
    set_seed(3)
    made = AutoStagedModelForCausalLM.from_config(loaded.config, args=args)
    values = held(loaded), held(made)
    OuroborosTrainer(model=made, args=args, train_dataset=StreamRows()).train()
    shared = tiny_xl(untie_r=False).config
    with pytest.raises(UnsupportedModelError, match=r"model\.untie_r_biases\(\)"):
        AutoStagedModelForCausalLM.from_config(shared, args=args)
    return values


def held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_meta}


@pytest.mark.slow
@pytest.mark.parametrize("config", [CUT, {**CUT_ONE_TABLE, "tie_word_embeddings": False}], ids=["tied", "untied"])
def test_staged_loading_equals_the_unsplit_model(tmp_path: Path, config: dict[str, Any]) -> None:
    model = tiny_xl(**config)
    model.save_pretrained(tmp_path / "saved")
    parts = in_processes(2, make, str(tmp_path / "out"), str(tmp_path / "saved"))
    set_seed(3)
    fresh = AutoModelForCausalLM.from_config(model.config)
    for which, expected in enumerate([model, fresh]):
        merged = {name: p for part in parts for name, p in part[which].items()}
        assert differing({name: p.detach() for name, p in expected.named_parameters()}, merged) == []
        assert not parts[0][which].keys() & parts[1][which].keys()
