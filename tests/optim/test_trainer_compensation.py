"""Delay compensation through the Trainer: numbers, checkpoints, refusals, advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import (
    assert_same,
    complete_optimizer,
    logged,
    ouroboros,
    outcome,
    split_options,
    tiny_model,
    trained,
)

import hf_ouroboros.hooks.optimizer
from hf_ouroboros.errors import CheckpointError, UnsupportedOptionError
from hf_ouroboros.optim import choose
from hf_ouroboros.optim.advice import automatic, with_muon
from hf_ouroboros.optim.muon import MuonAdamW

SPLIT = split_options(3, 2) | {"gradient_accumulation_steps": 1, "num_train_epochs": 1, "weight_decay": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compensation", "options"),
    [
        ("nesterov+lr_rescale", {"delay_compensation_args": "anneal=3"}),
        ("muon+weight_prediction", {"lr_scheduler_type": "cosine", "warmup_steps": 2, "bf16": True}),
        ("weight_prediction", {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "eval_strategy": "epoch"}),
        ("gap_aware", {"optim": "sgd", "learning_rate": 0.1}),
        ("muon+error_feedback", {"max_grad_norm": 0.1}),
        (
            "muon+weight_prediction",
            {"delay_compensation_args": "adjust_lr_fn=measure_rms_adamw", "learning_rate": 1e-2},
        ),
        ("muon+weight_prediction+error_feedback", {"delay_compensation_args": "prediction=step"}),
        ("basis_rotation", {"delay_compensation_args": "refresh=2", "delay_warmup_steps": 2}),
    ],
)
def test_schedules_agree(tmp_path: Path, compensation: str, options: dict[str, Any]) -> None:
    given = SPLIT | options | {"delay_compensation": compensation}
    expected, found = (trained(tmp_path / s, schedule=s, **given) for s in ("reference", "pipelined"))
    assert_same(expected, found)
    assert logged(expected, "learning_rate") == logged(found, "learning_rate")


def test_optimizers_are_made_of_trainers_groups(tmp_path: Path) -> None:
    options = SPLIT | {"learning_rate": 3e-3, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    made = ouroboros(tmp_path, delay_compensation="nesterov", delay_compensation_args="beta1=0.98", **options)
    made.create_optimizer()
    optimizer = complete_optimizer(made)
    assert type(optimizer) is torch.optim.NAdam
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.98, 0.9), 1e-6, 3e-3)
        assert group["decoupled_weight_decay"]
    made = ouroboros(tmp_path, delay_compensation="muon", delay_compensation_args="momentum=0.9", **options)
    made.create_optimizer()
    optimizer = complete_optimizer(made)
    assert type(optimizer) is MuonAdamW
    groups = [(g["algorithm"], g["weight_decay"], len(g["params"]), g["lr"]) for g in optimizer.param_groups]
    assert groups == [("muon", 0.1, 20, 3e-3), ("adamw", 0.1, 2, 3e-3), ("adamw", 0.0, 42, 3e-3)]
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("compensation", ["nesterov+gap_aware", "muon+weight_prediction"])
def test_a_resumed_run_equals_itself(tmp_path: Path, compensation: str) -> None:
    options = SPLIT | {"delay_compensation": compensation, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", schedule="reference", **options)
    expected = outcome(whole)
    saved = tmp_path / "whole" / "checkpoint-2"
    assert_same(expected, trained(tmp_path / "resumed", resume=saved, schedule="pipelined", **options))
    with pytest.raises(
        CheckpointError, match=f"delay_compensation='{compensation}', this run has 'none'".replace("+", r"\+")
    ):
        trained(tmp_path / "other", resume=saved, **(options | {"delay_compensation": "none"}))


def test_refused_with_an_optimizer_of_the_scripts_own(tmp_path: Path) -> None:
    model = tiny_model()
    adagrad = torch.optim.Adagrad(model.parameters())
    with pytest.raises(
        UnsupportedOptionError, match="'muon' brings its own optimizer, but this trainer was given another"
    ):
        ouroboros(tmp_path, {"model": model, "optimizers": (adagrad, None)}, delay_compensation="muon")
    given = {"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {})}
    with pytest.raises(UnsupportedOptionError, match="'nesterov' brings its own optimizer"):
        ouroboros(tmp_path, given, delay_compensation="nesterov")
    with pytest.raises(UnsupportedOptionError, match="weight_prediction.*not Adagrad"):
        ouroboros(tmp_path, {"model": model, "optimizers": (adagrad, None)}, delay_compensation="weight_prediction")
    with pytest.raises(UnsupportedOptionError, match="weight_prediction.*not Adafactor"):
        trained(tmp_path, optim="adafactor", delay_compensation="weight_prediction")


def test_auto(tmp_path: Path) -> None:
    def chosen(trainer: dict[str, Any] | None = None, **options: Any) -> str:
        return str(ouroboros(tmp_path, trainer, delay_compensation="auto", **(SPLIT | options)).delay_compensation)

    assert chosen(gradient_accumulation_steps=3) == chosen(gradient_accumulation_steps=4) == "weight_prediction"
    assert chosen() == chosen(gradient_accumulation_steps=2) == "muon+weight_prediction+lr_rescale"
    assert chosen(schedule="1f1b") == "none"
    assert chosen(optim="sgd") == "none"
    assert chosen({"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {})}) == "none"


def test_muon_auto(tmp_path: Path) -> None:
    def made(**options: Any) -> Any:
        return ouroboros(tmp_path, delay_compensation="muon+auto", **(SPLIT | options))

    for micro_batches in (1, 4):
        found = made(gradient_accumulation_steps=micro_batches).delay_compensation
        assert found == choose(*with_muon(3, micro_batches))
    assert made(schedule="1f1b").delay_compensation == choose("muon")
    with pytest.raises(UnsupportedOptionError, match="delay_compensation_args='momentum=0.9' needs to know of what"):
        made(delay_compensation_args="momentum=0.9")
    with pytest.raises(UnsupportedOptionError, match="'muon\\+auto' brings its own optimizer, so optim='sgd'"):
        made(optim="sgd")


@pytest.mark.slow
def test_muon_auto_equals_what_it_stands_for(tmp_path: Path) -> None:
    options = SPLIT | {"gradient_accumulation_steps": 4}
    found = trained(tmp_path / "short", **options, delay_compensation="muon+auto")
    name, given = with_muon(3, 4)
    expected = trained(
        tmp_path / "named", schedule="reference", **options, delay_compensation=name, delay_compensation_args=given
    )
    assert_same(expected, found)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_auto_equals_what_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batches: int) -> None:
    told: list[str] = []
    monkeypatch.setattr(hf_ouroboros.hooks.optimizer.logger, "warning", told.append)
    options = SPLIT | {"gradient_accumulation_steps": micro_batches, "learning_rate": 1e-4}
    found = trained(tmp_path / "auto", **options, delay_compensation="auto")
    said = [text for text in told if "'auto'" in text]
    name, given = automatic(3, micro_batches, "adamw")
    expected = trained(
        tmp_path / "named", schedule="reference", **options, delay_compensation=name, delay_compensation_args=given
    )
    assert_same(expected, found)
    assert len(said) == (micro_batches == 1)
    if said:
        assert f"is {name} here" in said[0] and "delay_compensation='weight_prediction' keeps AdamW" in said[0]


@pytest.mark.slow
def test_costly_delays_are_told_with_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(hf_ouroboros.hooks.optimizer.logger, "warning", told.append)
    options = SPLIT | {"max_steps": 1}
    trained(tmp_path, **options)
    assert len(told) == 1 and "cost 5.9 % in bits per byte" in told[0]
    recommended = {"gradient_accumulation_steps": 4, "delay_compensation": "muon+error_feedback"}
    for other in (recommended, {"schedule": "1f1b"}, {"optim": "sgd"}):
        trained(tmp_path, **(options | other))
    assert len(told) == 1
