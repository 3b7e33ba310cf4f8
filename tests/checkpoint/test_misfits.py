"""Checkpoints of other runs: refused before anything is loaded, with what differs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import assert_same, ouroboros, split_options, stock, tiny_model, trained

from hf_ouroboros import CheckpointError, CheckpointMismatchError
from hf_ouroboros.checkpoint import STATE_TENSORS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trained(folder, save_strategy="steps", save_steps=2, max_steps=2)
    return folder / "checkpoint-2"


def assert_refused(trainer: Any, folder: Path, match: str | None = None) -> None:
    """The run is refused by name, and neither weights nor optimizer were touched."""
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        trainer.train(resume_from_checkpoint=str(folder))
    assert_same(before, dict(trainer.model.state_dict()))


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer whose weights are not those of the checkpoint."""
    trainer = ouroboros(tmp_path_factory.mktemp("other"))
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight += 1
    return trainer


def test_stock_checkpoint(tmp_path: Path, other_weights: Any) -> None:
    stock(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    assert_refused(other_weights, tmp_path / "checkpoint-1", match=r"ouroboros_state\.json.*OuroborosTrainer")


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "more stages": (split_options(4, 3), r"written with 3 stages, this run has 4.*num_stages=3"),
    "one stage": (split_options(1, 1), "written with 3 stages, this run has 1"),
    "other layers": ({"device_map": [2, 2, 1]}, "same device_map"),
    "synchronous": ({"schedule": "1f1b"}, "delayed gradients that are still to be applied"),
    "longer warm-up": ({"delay_warmup_steps": 5}, "delay_warmup_steps"),
    "paper": ({"schedule": "lockstep", "tied_gradient": "paper"}, "tied_gradient='joint'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MISFITS)
def test_a_state_of_another_run_leaves_the_weights_alone(tmp_path: Path, checkpoint: Path, case: str) -> None:
    options, match = MISFITS[case]
    assert_refused(ouroboros(tmp_path, **options), checkpoint, match)


def model_in(dtype: torch.dtype) -> Any:
    return tiny_model().to(dtype)


def frozen() -> Any:
    model = tiny_model()
    model.transformer.wpe.weight.requires_grad = False
    return model


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another optimizer": ({}, {"optim": "sgd", "optim_args": "momentum=0.9"}, r"optimizer='AdamW', this run has 'SGD'"),
    "a second one": ({}, {"optim": "adafactor"}, r"optimizer='AdamW', this run has 'Adafactor'"),
    "a compensation": ({}, {"delay_compensation": "muon"}, r"delay_compensation='none', this run has 'muon"),
    "another scheduler": (
        {},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "metric_for_best_model": "loss"},
        r"scheduler='LambdaLR', this run has 'ReduceLROnPlateau'",
    ),
    "untied": (
        {"model": lambda: tiny_model(tied=False)},
        {"num_stages": 3},
        r"has no 'lm_head\.weight'.*embeddings may be tied, which they are not here",
    ),
    "fewer layers": (
        {"model": lambda: tiny_model(layers=4)},
        {},
        r"has 'transformer\.h\.4\..*, which this run's model has not",
    ),
    "more layers": ({"model": lambda: tiny_model(layers=6)}, {}, r"has no 'transformer\.h\.5\."),
    "another dtype": ({"model": lambda: model_in(torch.bfloat16)}, {}, r"as F32 instead of BF16.*same dtype"),
    "frozen": (
        {"model": frozen},
        {},
        r"same device_map and frozen layers|'transformer\.wpe\.weight'.*in the checkpoint's only",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_another_kind_of_run(tmp_path: Path, checkpoint: Path, case: str) -> None:
    """Named before the first update, and without advising the checkpoint before, which would fail alike."""
    given, options, match = OTHERS[case]
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    trainer = ouroboros(tmp_path / "new", {key: make() for key, make in given.items()}, **options)
    with pytest.raises(CheckpointMismatchError, match=match) as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "The checkpoint before it" not in str(caught.value)


def test_tied_from_untied(tmp_path: Path) -> None:
    trained(tmp_path, {"model": tiny_model(tied=False)}, save_strategy="steps", save_steps=2, max_steps=2, num_stages=3)
    with pytest.raises(CheckpointMismatchError, match=r"has 'lm_head\.weight'.*embeddings are not tied, here they are"):
        trained(tmp_path / "new", resume=tmp_path / "checkpoint-2")


def test_groups_of_an_own_optimizer(tmp_path: Path) -> None:
    """The same parameters in another order would get each other's moments."""

    def given(turned: bool) -> dict[str, Any]:
        model = tiny_model()
        parameters = list(model.parameters())
        return {"model": model, "optimizers": (torch.optim.AdamW(parameters[:: -1 if turned else 1], lr=1e-2), None)}

    trained(tmp_path, given(False), save_strategy="steps", save_steps=2, max_steps=2)
    with pytest.raises(CheckpointMismatchError, match="in another order"):
        trained(tmp_path / "new", given(True), resume=tmp_path / "checkpoint-2")


@pytest.mark.slow
def test_after_a_refusal_the_trainer_still_trains(tmp_path: Path, checkpoint: Path) -> None:
    trainer = ouroboros(tmp_path)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-2"))
    (folder / STATE_TENSORS).write_bytes(b"")
    assert_refused(trainer, folder)
    trainer.train()
    assert_same(trained(tmp_path / "b"), trainer)
