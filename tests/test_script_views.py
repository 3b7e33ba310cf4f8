"""Views of weights that a script keeps: they stay views of the weights, as in stock Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from script_runs import Script, assert_equal, plain_model
from trainer_helpers import tiny_model
from transformers import Trainer, TrainerCallback

from hf_ouroboros.engine import weights


class AtEachStep(TrainerCallback):
    def __init__(self, do: Callable[[], None]):
        self.do = do

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.do()


class KeepsThem(TrainerCallback):
    """Keeps views when training begins, and reads and writes by them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.kept = model.state_dict()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        norm = sum(value.norm() for value in self.kept.values())
        self.kept["transformer.h.0.mlp.c_fc.weight"].clamp_(-0.02, 0.02)
        with torch.no_grad():
            model.transformer.ln_f.bias.add_(1e-3 * norm)


def kept_before(trainer: Trainer) -> None:
    views = [parameter.data for parameter in trainer.model.parameters()]
    trainer.add_callback(AtEachStep(lambda: [view.mul_(0.99) for view in views]))


def of_numpy(trainer: Trainer) -> None:
    """Nothing tells torch that it is written."""
    view = trainer.model.transformer.h[0].mlp.c_fc.weight.detach().numpy()

    def write() -> None:
        view[:] = view * 0.9

    trainer.add_callback(AtEachStep(write))


CASES: dict[str, Script] = {
    "kept before training": Script(kept_before, max_steps=4),
    "of a tied matrix": Script(kept_before, lambda: tiny_model(dropout=0.0), max_steps=4),
    "NumPy's": Script(of_numpy, max_steps=4),
    "read and written": Script(lambda trainer: trainer.add_callback(KeepsThem()), max_steps=4),
    "every micro-batch an update": Script(kept_before, max_steps=4, gradient_accumulation_steps=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_views_stay_alive(case: str, tmp_path: Path) -> None:
    assert_equal(tmp_path, CASES[case], exact=() if "tied" in case else ("1f1b",))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["pipelined", "1f1b"])
def test_without_views_no_weights_are_copied(schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not for what somebody holds by mistake: an old version, a part of a graph."""
    found: list[bool] = []
    real = weights._has_views
    monkeypatch.setattr(weights, "_has_views", lambda parameter: found.append(real(parameter)) or found[-1])

    def saved() -> Any:
        plain_model().save_pretrained(tmp_path / "model")
        return type(plain_model()).from_pretrained(tmp_path / "model")

    replayed = [{"recompute": True}, *([{"weights": "now"}] if schedule == "pipelined" else [])]
    for options in ({"model": saved, "save_strategy": "steps", "save_steps": 2}, *replayed):
        assert isinstance(Script(max_steps=4, **options).run(tmp_path, schedule), dict)
    assert found and not any(found)
