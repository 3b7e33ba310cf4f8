"""weights="now" through the trainer: every schedule is its reference, scripts and models included; resuming; refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from script_runs import Script, assert_equal
from torch.nn.utils import parametrizations
from trainer_helpers import (
    EVERY,
    AtStep,
    assert_same,
    differing,
    ouroboros,
    outcome,
    split_options,
    tiny_model,
    trained,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

from hf_ouroboros import CheckpointError, OuroborosError, UnsupportedOptionError

NOW = {"weights": "now", "max_steps": 5, "gradient_accumulation_steps": 1}


def at_reference(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "schedule": "reference"}


@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
def test_equal_to_the_reference(schedule: str, tmp_path: Path) -> None:
    """With dropout, evaluations in between, a delay warm-up, and callbacks that look at weights and change them."""
    found = []
    for name in ("reference", schedule):
        options = {**NOW, "schedule": name, "delay_warmup_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
        trainer = ouroboros(tmp_path / name, **options, **split_options(4, 3))
        trainer.add_callback(AtStep(3, lambda model=trainer.model: change(model)))
        trainer.train()
        found.append((outcome(trainer), [e for e in trainer.state.log_history if "eval_loss" in e or "grad_norm" in e]))
    assert differing(found[0][0], found[1][0]) == []
    for one, other in zip(found[0][1], found[1][1], strict=True):
        keys = one.keys() & {"loss", "grad_norm", "eval_loss", "step"}
        assert {key: one[key] for key in keys} == {key: other[key] for key in keys}


@torch.no_grad()
def change(model: PreTrainedModel) -> None:
    """What a callback may do to the weights: the replays that follow use what is there."""
    model.transformer.h[0].mlp.c_fc.weight.mul_(0.9)


class Scales(TrainerCallback):
    """Looks at gradients, and changes them."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        if (gradient := model.transformer.h[0].mlp.c_fc.weight.grad) is not None:
            gradient.mul_(0.5)


def test_gradients_that_scripts_change(tmp_path: Path) -> None:
    found = []
    for schedule in ("reference", "pipelined"):
        given = {"callbacks": [Scales()], "model": tiny_model(dropout=0.1)}
        found.append(
            outcome(trained(tmp_path, given, **{**NOW, "max_steps": 4}, schedule=schedule, **split_options(3, 2)))
        )
    assert differing(*found) == []


WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {"bf16": True},
    "ragged": {"gradient_accumulation_steps": 2, "max_steps": 6},
    "muon": {"delay_compensation": "muon+error_feedback"},
    "untied, on two devices": {"model": {"tied": False}, **split_options(5, 2)},
    "adafactor": {"optim": "adafactor", "max_grad_norm": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WAYS)
def test_with_options(case: str, tmp_path: Path) -> None:
    options = {**NOW, **split_options(3, 2), **WAYS[case]}
    model = options.pop("model", {})
    expected = trained(tmp_path / "a", {"model": tiny_model(**model)}, **at_reference(options))
    for schedule in ("pipelined", "lockstep") if EVERY else ("pipelined",):
        assert_same(expected, trained(tmp_path / "b", {"model": tiny_model(**model)}, schedule=schedule, **options))


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixture of experts, balanced": lambda: AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "mixtral", **SMALL, num_hidden_layers=3, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
        )
    ),
    "t5": lambda: AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model(
            "t5", d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2, vocab_size=61,
            decoder_start_token_id=0, dropout_rate=0.1, use_cache=False,
        )
    ),
}  # fmt: skip


# ---- resuming ----


def frozen_below() -> PreTrainedModel:
    model = tiny_model(dropout=0.1)
    model.transformer.wte.requires_grad_(False)
    for layer in model.transformer.h[:2]:
        layer.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    return model


MADE = {**MODELS, "frozen below": frozen_below}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
def test_models(kind: str, tmp_path: Path) -> None:
    """Losses of routers are computed of what stages hand on; a matrix that is used three times; resuming."""
    found = []
    saving = {"save_strategy": "steps", "save_steps": 2}
    runs = (
        ("reference", {}, None),
        ("pipelined", saving, None),
        ("pipelined", {}, tmp_path / "pipelined" / "checkpoint-2"),
    )
    for schedule, more, resume in runs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = MADE[kind]()
        options = {**NOW, "schedule": schedule, "max_steps": 4, **split_options(3, 2), **more}
        found.append(outcome(trained(tmp_path / schedule, {"model": model}, resume=resume, **options)))
    assert differing(found[0], found[1]) == differing(found[0], found[2]) == []


@pytest.mark.parametrize(("step", "schedule"), [(2, "pipelined"), (4, "reference")])
def test_a_resumed_run_is_the_uninterrupted_one(step: int, schedule: str, tmp_path: Path) -> None:
    options = {**NOW, **split_options(4, 3), "max_steps": 6, "gradient_accumulation_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": 2}
    expected = outcome(trained(tmp_path / "whole", **options))
    assert_same(expected, trained(tmp_path / "saved", **options, **saving))
    resume = tmp_path / "saved" / f"checkpoint-{step}"
    assert_same(expected, trained(tmp_path / "on", resume=resume, **{**options, "schedule": schedule}))


def test_checkpoints_of_the_other_rule_are_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    for weights, other in (("now", "then"), ("then", "now")):
        trained(tmp_path / weights, weights=weights, **saving)
        trainer = ouroboros(tmp_path / "on", weights=other, max_steps=4)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"written with weights='{weights}', this run has '{other}'"):
            trainer.train(resume_from_checkpoint=str(tmp_path / weights / "checkpoint-2"))
        assert differing(before, dict(trainer.model.state_dict())) == []


# ---- scripts ----


def halved(trainer: Trainer) -> None:
    trainer.model.transformer.h[1].register_forward_hook(
        lambda m, i, o: (o[0] * 0.9, *o[1:]) if isinstance(o, tuple) else o * 0.9
    )


def noisy(trainer: Trainer) -> None:
    layers = trainer.model.transformer.h
    layers[1].mlp.register_forward_hook(lambda m, i, o: o * (1 + 0.1 * torch.randn_like(o)) if m.training else None)
    layers[0].mlp.register_full_backward_hook(lambda m, i, o: (i[0] / 2,))
    trainer.model.transformer.wpe.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))


@pytest.mark.parametrize("prepare", [halved, noisy])
def test_hooks_of_scripts(prepare: Callable[[Trainer], None], tmp_path: Path) -> None:
    assert_equal(tmp_path, Script(prepare, **NOW), exact=())


def normalised() -> PreTrainedModel:
    model = tiny_model(tied=False, dropout=0.0)
    parametrizations.spectral_norm(model.transformer.h[0].mlp.c_fc)
    return model


def reads(trainer: Trainer) -> None:
    part = trainer.model.transformer.h[2].mlp
    part.register_forward_hook(lambda m, i, o: o * (1 + 0 * part.c_fc.weight.detach().norm()))


REFUSED = {
    "a buffer": (
        Script(model=normalised, **NOW),
        "weights='now' would replay it with another value; train without weights='now'",
    ),
    "a weight of another moment": (Script(reads, **NOW), "the forward of stage 1 reads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_replay_would_do_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    script, message = REFUSED[case]
    found = script.run(tmp_path, "pipelined")
    assert isinstance(found, OuroborosError) and message in str(found), found


def test_auto_that_predicts_is_refused(tmp_path: Path) -> None:
    for accumulation, choice in ((4, "weight_prediction"), (1, r"muon\+weight_prediction\+lr_rescale")):
        with pytest.raises(UnsupportedOptionError, match=f"'auto' is {choice} here, and weight_prediction does not go"):
            ouroboros(
                tmp_path,
                weights="now",
                delay_compensation="auto",
                gradient_accumulation_steps=accumulation,
                **split_options(3, 2),
            )
    ouroboros(tmp_path, weights="now", delay_compensation="auto", **split_options(1, 1))
    ouroboros(tmp_path, weights="now", delay_compensation="auto", optim="sgd")
