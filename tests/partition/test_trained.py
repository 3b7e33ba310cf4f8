"""A gradient flows no further than something is trained, frozen weights have one version, and ends may be apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Case, Run, assert_same_run, differences, tiny_gpt2
from torch import nn
from trainer_helpers import ouroboros, outcome, split_options, tiny_model, trained

import hf_ouroboros.partition.split
from hf_ouroboros import UnsupportedModelError
from hf_ouroboros.partition import split_model


def freeze(*trained: str) -> Any:
    """Freezes all parameters but those whose names contain a word."""

    def prepare(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(word in name for word in trained))

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("trained", ["h.2.", "h.4.", "ln_f", "h.0.", "wte"])
def test_frozen_stages_send_no_gradients(trained: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(stages=4, devices=3, updates=(1, 2, 1), recompute=recompute, dropout=0.1)
    expected = Run(replace(case, recompute=False), "reference", freeze(trained)).train()
    found = Run(case, "pipelined", freeze(trained))
    runners = found.engine._runners
    sent: dict[int, set[int]] = {k: set() for k in runners}
    computed: dict[int, int] = dict.fromkeys(runners, 0)
    for k, runner in runners.items():

        def backward(*args: Any, k: int = k, original: Any = runner.backward, **kwargs: Any) -> Any:
            gradients, before = original(*args, **kwargs)
            sent[k].add(len(before or {}))
            return gradients, before

        def compute(*args: Any, k: int = k, original: Any = runner._compute) -> Any:
            computed[k] += 1
            return original(*args)

        runner.backward, runner._compute = backward, compute
    assert_same_run(expected, found.train())
    first = next(k for k in runners if any(p.requires_grad for p in found.engine.partition.owned(k).values()))
    assert [max(sent[k], default=0) for k in runners] == [int(k > first) for k in runners]
    assert all(computed[k] == 4 for k in runners if k < first)  # nothing is replayed
    leaves = [leaf for k in runners for leaf in runners[k]._versions.leaves().items()]
    frozen = {p.data_ptr() for p in found.model.parameters() if not p.requires_grad}
    assert all((leaf.data_ptr() in frozen) is not leaf.requires_grad for _, leaf in leaves)  # they are the model's own


def test_a_frozen_tied_matrix_may_be_on_two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt2()
    assert split_model(model, ["cpu:0", "cpu:1"]).plan.placement == (0, 1, 0)
    model.transformer.wte.requires_grad_(False)
    assert split_model(model, ["cpu:0", "cpu:1"]).plan.placement == (0, 1)
    # As if they were two accelerators: the last stage gets a copy, which follows the original.
    places = {"cpu:0": torch.device("cpu"), "cpu:1": torch.device("cpu", 0)}
    monkeypatch.setattr(
        hf_ouroboros.partition.split, "torch_device", lambda name: places.get(name, torch.device("cpu"))
    )
    partition = split_model(model, ["cpu:0", "cpu:1"])
    original, copy = partition.copies[0]
    assert original is model.lm_head.weight and copy is partition.stages[-1].get_parameter("lm_head.weight")
    assert copy is not original and torch.equal(copy, original)
    with torch.no_grad():
        original.add_(1)
    hf_ouroboros.partition.trained.refresh(partition)
    assert torch.equal(copy, original)


def test_the_plan_tells_what_is_trained(tmp_path: Path) -> None:
    model = tiny_model()
    freeze("h.4.", "ln_f")(model)
    trainer = ouroboros(tmp_path, {"model": model}, **split_options(2, 2))
    rows = trainer.stage_plan.rows
    assert rows[0].trained_parameters == 0 and rows[0].frozen == rows[0].parameters
    assert rows[1].trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "trained" in str(trainer.stage_plan) and f"trained: {rows[1].trained_parameters:,};" in str(
        trainer.stage_plan
    )
    assert "trained" not in str(ouroboros(tmp_path, **split_options(2, 2)).stage_plan)


@pytest.mark.slow
def test_frozen_after_the_trainer_was_made(tmp_path: Path) -> None:
    """The numbers are those of a model that was frozen before."""
    runs = []
    for late in (False, True):
        model = tiny_model()
        freeze("h.3.", "h.4.", "wte")(model)
        if not late:
            freeze("h.3.", "h.4.")(model)
        trainer = ouroboros(tmp_path / str(late), {"model": model}, **split_options(3, 2))
        freeze("h.3.", "h.4.")(model)
        trainer.train()
        runs.append(outcome(trainer))
    assert differences(runs[0]["weights"], runs[1]["weights"]) == []

    model = tiny_model()
    freeze("h.4.")(model)
    trainer = ouroboros(tmp_path, {"model": model}, **split_options(2, 2))
    model.requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match=r"transformer.wte.weight, .* create the trainer after unfreezing"):
        trainer.train()


@pytest.mark.slow
def test_resumes_with_frozen_ends(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **split_options(3, 3)}

    def model() -> Any:
        made = tiny_model()
        freeze("h.2.")(made)
        return made

    expected = outcome(trained(tmp_path, {"model": model()}, **options))
    again = outcome(trained(tmp_path, {"model": model()}, resume=tmp_path / "checkpoint-2", **options))
    assert differences(expected["weights"], again["weights"]) == []
