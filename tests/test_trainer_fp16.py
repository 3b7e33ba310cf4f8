"""fp16=True through the trainer: stock Trainer's numbers without delays, the reference's with; logs, resuming, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import (
    EVERY,
    AtStep,
    ExactTrainer,
    assert_same,
    differing,
    logged,
    ouroboros,
    outcome,
    split_options,
    stock,
    tiny_model,
    trained,
)
from transformers import TrainerCallback

from hf_ouroboros import OuroborosArguments, OuroborosTrainer, UnsupportedOptionError

HALF: dict[str, Any] = {"fp16": True, "max_steps": 8, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Large:
    """A loss whose gradients overflow with the first scales."""

    factor = 8.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See `Trainer.compute_loss`."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss if return_outputs else loss * self.factor


class Scaled(Large, ExactTrainer):
    """Stock Trainer as on a GPU: accelerate has a scaler there only, but torch has one on CPUs, too."""

    def create_accelerator_and_postprocess(self) -> None:
        """See `Trainer`."""
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu")


class LargeOuroboros(Large, OuroborosTrainer):
    """The same loss over stages."""


def run(folder: Path, trainer: dict[str, Any] | None = None, **options: Any) -> OuroborosTrainer:
    given = {"cls": LargeOuroboros, "model": tiny_model(tied=False, dropout=0.0)} | (trainer or {})
    return trained(folder, given, **{**HALF, **split_options(3, 2), **options})


@pytest.mark.parametrize(("schedule", "optim"), [("1f1b", "adamw_torch"), ("zero_bubble", "adamw_torch_fused")])
def test_without_delays_it_is_stock_trainer(schedule: str, optim: str, tmp_path: Path) -> None:
    options = {**HALF, "max_grad_norm": 0.0, "optim": optim}  # the norm of several stages is summed in another order
    expected = stock(tmp_path / "stock", {"cls": Scaled, "model": tiny_model(tied=False, dropout=0.0)}, **options)
    expected.train()
    found = run(tmp_path / "ours", **options, schedule=schedule)
    assert_same(expected, found)
    for key in ("loss", "learning_rate"):
        assert logged(expected, key) == logged(found, key)
    scales, skipped = logged(found, "loss_scale"), sum(logged(found, "skipped_updates"))
    assert scales[0] == 65536.0 and scales[-1] == expected.accelerator.scaler.get_scale() < scales[0]
    assert skipped > 0
    # Stock's fused optimizers skip steps by themselves, of which the scheduler does not hear.
    counted = 8 if "fused" in optim else 8 - skipped
    assert found.lr_scheduler.state_dict()["last_epoch"] == counted


@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
def test_with_delays_it_is_the_reference(schedule: str, tmp_path: Path) -> None:
    """With dropout, evaluations in between, and callbacks that look."""
    found = []
    for name in ("reference", schedule):
        options = {
            **HALF,
            **split_options(3, 2),
            "schedule": name,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "max_steps": 12,
        }
        trainer = ouroboros(tmp_path / name, {"cls": LargeOuroboros, "model": tiny_model()}, **options)
        trainer.add_callback(AtStep(4, trainer.synchronize))
        trainer.train()
        found.append((outcome(trainer), trainer.state.log_history))
    assert differing(found[0][0], found[1][0]) == []
    keys = ("loss", "eval_loss", "learning_rate", "loss_scale", "skipped_updates", "step")
    logs = [
        [[entry[key] for key in keys if key in entry] for entry in log if "train_runtime" not in entry]
        for _, log in found
    ]
    assert logs[0] == logs[1]
    skipped = [entry["skipped_updates"] for entry in found[1][1] if "skipped_updates" in entry]
    assert set(skipped) == {0, 1}, "some were, and some were not"
    assert found[0][0]["scheduler"]["last_epoch"] == 12


def test_updates_that_are_skipped_are_counted_between_logs(tmp_path: Path) -> None:
    each = logged(run(tmp_path / "a", max_steps=10), "skipped_updates")
    found = logged(run(tmp_path / "b", max_steps=10, logging_steps=5), "skipped_updates")
    assert found == [sum(each[:5]), sum(each[5:])]


@pytest.mark.parametrize("step", [2, 4, 6] if EVERY else [4])
def test_resumes_across_overflows(step: int, tmp_path: Path) -> None:
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path, **options)
    given = {"cls": LargeOuroboros, "model": tiny_model(tied=False, dropout=0.0)}
    found = trained(
        tmp_path / "again", given, resume=tmp_path / f"checkpoint-{step}", **{**HALF, **split_options(3, 2), **options}
    )
    assert_same(whole, found)
    assert logged(whole, "loss_scale") == logged(found, "loss_scale")


class Doubles(TrainerCallback):
    """Looks at gradients, and changes them."""

    seen = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if (gradient := model.transformer.h[0].mlp.c_fc.weight.grad) is not None:
            assert gradient.isfinite().all()
            gradient.mul_(2.0)
            self.seen += 1


@pytest.mark.slow
@pytest.mark.parametrize("schedules", [("reference", "pipelined"), ("1f1b", "zero_bubble")])
def test_scripts_see_gradients_that_are_finite_and_unscaled(schedules: tuple[str, str], tmp_path: Path) -> None:
    looks = [Doubles(), Doubles()]
    found = [
        run(tmp_path / s, {"callbacks": [c]}, schedule=s, max_steps=10) for s, c in zip(schedules, looks, strict=True)
    ]
    assert_same(*found)
    assert 0 < looks[0].seen == looks[1].seen < 10, "dropped gradients are not seen"


# ---- options ----


def test_a_launcher_may_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tmp_path / "a", max_steps=4)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    found = run(tmp_path / "b", max_steps=4, fp16=False)
    assert_same(expected, found)
    assert found.accelerator.scaler is None and found.args.mixed_precision == "fp16"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"weights": "now"}, "weights='now'.*fp16=True"),
    ({"fused_head": "on"}, "fused_head='on'.*fp16=True"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match=message):
        OuroborosArguments(output_dir=str(tmp_path), use_cpu=True, fp16=True, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trained_weights_have_to_be_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    trainer = ouroboros(tmp_path, {"model": tiny_model().to(dtype)}, **HALF)
    with pytest.raises(UnsupportedOptionError, match=r"fp16=True.*wte.*load the model with dtype=torch.float32"):
        trainer.train()


def test_evaluation_is_in_float16(tmp_path: Path) -> None:
    given = {"model": tiny_model(tied=False, dropout=0.0)}
    ours = ouroboros(tmp_path / "a", given, **HALF, **split_options(3, 2)).evaluate()["eval_loss"]
    plain = ouroboros(tmp_path / "c", {"model": tiny_model(tied=False, dropout=0.0)}).evaluate()["eval_loss"]
    assert ours != plain and ours == pytest.approx(plain, rel=1e-3)
