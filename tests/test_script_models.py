"""Models, batches and evaluations that a script has made its own: as in stock Trainer, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from script_runs import Script, assert_equal, assert_refused, plain_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers import GPT2LMHeadModel, PreTrainedModel, Trainer

from hf_ouroboros import OuroborosArguments, UnsupportedModelError, UnsupportedOptionError
from hf_ouroboros.partition.ownership import check_each_owned_once


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def changed(change: Callable[[PreTrainedModel], Any]) -> Callable[[], PreTrainedModel]:
    """Makes a model that has been changed, always alike."""

    def make() -> PreTrainedModel:
        model = plain_model()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            change(model)
        return model

    return make


PARAMETRIZED = {
    "weight norm, first stage": lambda m: parametrizations.weight_norm(m.transformer.h[0].mlp.c_fc),
    "weight norm, embedding": lambda m: parametrizations.weight_norm(m.transformer.wte),
    "weight norm, head": lambda m: parametrizations.weight_norm(m.lm_head),
    "spectral norm, whose forward writes into buffers": lambda m: parametrizations.spectral_norm(
        m.transformer.h[1].mlp.c_fc
    ),
    "old spectral norm": lambda m: torch.nn.utils.spectral_norm(m.transformer.h[4].mlp.c_fc),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_modules(kind: str, tmp_path: Path) -> None:
    assert_equal(tmp_path, Script(model=changed(PARAMETRIZED[kind])))


def test_a_replay_that_would_write_into_buffers_again_is_refused(tmp_path: Path) -> None:
    make = changed(lambda m: parametrizations.spectral_norm(m.transformer.h[0].mlp.c_fc))
    assert_refused(tmp_path, Script(model=make, recompute=True), "a forward writes into the buffer", ("pipelined",))


def one_layer_for_all(model: PreTrainedModel) -> None:
    """As ALBERT does."""
    for i in range(1, 5):
        model.transformer.h[i] = model.transformer.h[0]


SHARED = {
    "layer": (one_layer_for_all, "run more than once in a forward"),
    "norm of two layers": (lambda m: setattr(m.transformer.h[3], "ln_1", m.transformer.h[0].ln_1), "layers 0 and 3"),
    "norm of a layer and the end": (
        lambda m: setattr(m.transformer, "ln_f", m.transformer.h[0].ln_1),
        "shares a parameter with transformer.ln_f.weight",
    ),
    "bias": (lambda m: setattr(m.transformer.ln_f, "bias", m.transformer.h[0].ln_1.bias), "with transformer.ln_f.bias"),
}


@pytest.mark.parametrize("kind", SHARED)
def test_what_several_places_share_is_refused(kind: str, tmp_path: Path) -> None:
    change, why = SHARED[kind]
    assert_refused(tmp_path, Script(model=changed(change)), why, ("pipelined",))


def test_every_trainable_parameter_belongs_to_one_stage() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    one, two = ({f"{n}.{k}": p for k, p in model[n].named_parameters()} for n in ("one", "two"))
    check_each_owned_once(model, [one, two])
    with pytest.raises(UnsupportedModelError, match="stages 0, 1 share the parameter one.weight"):
        check_each_owned_once(model, [one, one | two])
    with pytest.raises(UnsupportedModelError, match="no stage has the parameter two.weight"):
        check_each_owned_once(model, [one, {}])
    model["two"].requires_grad_(False)
    check_each_owned_once(model, [one, {}])


def spare(model: PreTrainedModel) -> None:
    """Parameters that nobody uses, or that begin with zero."""
    model.spare, model.transformer.h[2].spare = nn.Linear(4, 4), nn.Linear(4, 4)
    model.alpha = nn.Parameter(torch.zeros(3))


def test_parameters_without_a_use(tmp_path: Path) -> None:
    assert_equal(tmp_path, Script(model=changed(spare)))


def collated(**more: Callable[[list], Any]) -> Callable[[Trainer], None]:
    """Another collator, whose batches have more, or others."""

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
        return batch | {key: value(rows) for key, value in more.items()}

    def prepare(trainer: Trainer) -> None:
        trainer.data_collator, trainer.args.remove_unused_columns = collate, False

    return prepare


def states(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """What an encoder might give for rows."""
    seeds = [int(row["input_ids"].sum()) for row in rows]
    return torch.stack([torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def with_cross_attention() -> PreTrainedModel:
    config = plain_model().config
    config.add_cross_attention = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


@pytest.mark.slow
def test_hidden_states_of_an_encoder(tmp_path: Path) -> None:
    prepare = collated(encoder_hidden_states=states)
    assert_equal(tmp_path, Script(prepare, model=with_cross_attention))
    assert_refused(tmp_path, Script(prepare), "If `encoder_hidden_states` are passed", ("pipelined",))


def test_labels_of_none(tmp_path: Path) -> None:
    assert_refused(tmp_path, Script(collated(labels=lambda rows: None)), "did not return a loss", ("pipelined",))


class Generating:
    """Generates in every evaluation."""

    found: list[Any]

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> tuple:
        """See `Trainer.prediction_step`."""
        start = inputs["input_ids"][:, :3]
        with torch.no_grad():
            tokens = model.generate(start, max_new_tokens=4, do_sample=False, pad_token_id=0)
            self.found.append(tokens.tolist())
            return model(**inputs).loss, tokens, inputs["labels"]


def test_generate_in_an_evaluation(tmp_path: Path) -> None:
    every: list[list[Any]] = []
    for kind in ("stock", "1f1b"):
        every.append([])
        script = Script(lambda t: setattr(t, "found", every[-1]), mixin=Generating, eval_strategy="steps", eval_steps=2)
        assert isinstance(script.run(tmp_path, kind), dict)
    assert every[0] == every[1] and len(every[0]) > 0


def test_hidden_states_of_predictions(tmp_path: Path) -> None:
    """One stage has them all; several don't, whenever they are asked for."""
    shapes = []
    for kind in ("stock", "alone"):
        trainer = Script(model=changed(lambda m: setattr(m.config, "output_hidden_states", True))).trainer(
            tmp_path, kind
        )
        logits, states = trainer.predict(trainer.eval_dataset).predictions
        shapes.append([logits.shape, *(state.shape for state in states)])
    assert shapes[0] == shapes[1]
    trainer = Script().trainer(tmp_path, "pipelined")
    trainer.model.config.output_hidden_states = True
    for call in (lambda: trainer.predict(trainer.eval_dataset), trainer.train):
        with pytest.raises(UnsupportedModelError, match="config.output_hidden_states=True"):
            call()


def test_debugging_of_overflows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="debug=.* is not supported"):
        OuroborosArguments(output_dir=str(tmp_path), debug="underflow_overflow", use_cpu=True)


def test_precision_of_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --mixed_precision`, or its configuration file, puts into the environment."""
    expected = Script(bf16=True).run(tmp_path, "pipelined")
    plain = Script().run(tmp_path, "pipelined")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = Script().run(tmp_path, "pipelined")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not all(torch.equal(found[name], value) for name, value in plain.items())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UnsupportedOptionError, match="mixed precision 'fp8'"):
        OuroborosArguments(output_dir=str(tmp_path), use_cpu=True)


def test_autocast_around_training_is_refused(tmp_path: Path) -> None:
    trainer = Script().trainer(tmp_path, "pipelined")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UnsupportedOptionError, match="within torch.autocast"):
        trainer.train()
