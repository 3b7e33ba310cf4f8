"""With adapters, every schedule's numbers are the reference's, and without delay stock Trainer's, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import CASES, trained_state, wrapped
from trainer_helpers import differing, outcome, split_options, stock, trained

RUN: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 1, **split_options(3, 2)}
SYNCHRONOUS: dict[str, Any] = {"max_steps": 2, "schedule": "1f1b", "max_grad_norm": 0.0, **split_options(3, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_pipelined_is_the_reference(case: str, tmp_path: Path) -> None:
    before = trained_state(wrapped(case))
    expected = trained(tmp_path / "reference", {"model": wrapped(case)}, schedule="reference", **RUN)
    found = trained(tmp_path / "pipelined", {"model": wrapped(case)}, **RUN)
    assert differing(outcome(expected), outcome(found)) == []
    after = trained_state(found.model)
    assert before.keys() == after.keys() and len(differing(before, after)) == len(before)


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES)
def test_without_delay_it_is_stock_trainer(case: str, tmp_path: Path) -> None:
    expected = stock(tmp_path / "stock", {"model": wrapped(case)}, max_steps=2, max_grad_norm=0.0)
    expected.train()
    found = trained(tmp_path / "1f1b", {"model": wrapped(case)}, **SYNCHRONOUS)
    if "tokens" in case:  # the two sides of the trained rows are added up in another order
        torch.testing.assert_close(trained_state(expected.model), trained_state(found.model), rtol=1e-4, atol=1e-6)
    else:
        assert differing(outcome(expected), outcome(found)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [{"recompute": True}, {"weights": "now"}, {"schedule": "lockstep"}, {"bf16": True}], ids=str
)
@pytest.mark.parametrize("case", ["lora on gpt2", "last layers"])
def test_other_ways_to_run_are_the_reference(case: str, given: dict[str, Any], tmp_path: Path) -> None:
    """With dropout in the adapters."""
    reference = {**given, "schedule": "reference", "recompute": False}
    expected = trained(tmp_path / "reference", {"model": wrapped(case, lora_dropout=0.2)}, **{**RUN, **reference})
    found = trained(tmp_path / "found", {"model": wrapped(case, lora_dropout=0.2)}, **{**RUN, **given})
    assert differing(outcome(expected), outcome(found)) == []


@pytest.mark.slow
@pytest.mark.parametrize("compensation", ["weight_prediction", "error_feedback", "auto", "gap_aware+lr_rescale"])
def test_delay_compensation_is_the_reference(compensation: str, tmp_path: Path) -> None:
    options = {**RUN, "delay_compensation": compensation}
    case = "lora on llama"
    expected = trained(tmp_path / "reference", {"model": wrapped(case)}, **{**options, "schedule": "reference"})
    found = trained(tmp_path / "found", {"model": wrapped(case)}, **options)
    assert differing(outcome(expected), outcome(found)) == []


def test_dropout_in_adapters_counts(tmp_path: Path) -> None:
    case = "lora on llama"
    runs = [trained(tmp_path / str(p), {"model": wrapped(case, lora_dropout=p)}, **RUN) for p in (0.0, 0.5)]
    assert differing(trained_state(runs[0].model), trained_state(runs[1].model)) != []
