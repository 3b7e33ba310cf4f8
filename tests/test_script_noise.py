"""Random numbers of a script: tied to stage and micro-batch, the same under every schedule and in a replay, or refused."""

from __future__ import annotations

import cProfile
import pstats
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from script_runs import Script, assert_equal, assert_refused
from torch.utils.checkpoint import checkpoint
from trainer_helpers import differing, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_ouroboros.errors import WorkerError


def in_layers(change: Callable[[torch.Tensor], Any], *layers: int) -> Callable[[Trainer], None]:
    """A hook that changes what a layer's second half puts out, in training mode only."""

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> Any:
        return change(output) if module.training else None

    def prepare(trainer: Trainer) -> None:
        for layer in layers or (1,):
            trainer.model.transformer.h[layer].mlp.register_forward_hook(hook)

    return prepare


def embedded(trainer: Trainer) -> None:
    """NEFTune by hand."""
    trainer.model.transformer.wte.register_forward_hook(
        lambda m, i, o: o + torch.zeros_like(o).uniform_(-0.1, 0.1) if m.training else o
    )


def tiny_llama() -> LlamaForCausalLM:
    """Whose attention has its dropout as a number, not as a module."""
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def rated(trainer: Trainer) -> None:
    """Set when the model has been split."""
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    for stage in trainer._partition.stages:
        for layer in stage.layers.values():
            layer.self_attn.attention_dropout = 0.3


@pytest.mark.slow
def test_dropout_that_is_a_number(tmp_path: Path) -> None:
    assert_equal(tmp_path, Script(rated, tiny_llama, recompute=True), exact=())
    changed, plain = (
        Script(prepare, tiny_llama).run(tmp_path, "pipelined") for prepare in (rated, lambda trainer: None)
    )
    assert any(not torch.equal(changed[name], plain[name]) for name in plain)


def attention_dropout(trainer: Trainer) -> None:
    """A rate that belongs to no module, changed after the model was split."""

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        module.attn_dropout.p = 0.3

    for layer in trainer.model.transformer.h:
        layer.attn.register_forward_pre_hook(hook, with_kwargs=True)


def smoothed(trainer: Trainer) -> None:
    """Noise in the loss."""

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits + 0.1 * torch.randn(outputs.logits.shape)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    trainer.compute_loss_func = loss


def many(output: torch.Tensor) -> torch.Tensor:
    """Functions of several kinds, some of them written in Python, some in place, some of integers."""
    chosen = torch.multinomial(torch.ones(4), 1) + torch.randint(1, 3, (1,))
    keep = torch.bernoulli(torch.tensor(0.5)) * torch.rand_like(output).round()
    return torch.dropout(output[torch.randperm(len(output))], 0.2, True) * chosen * keep + F.gumbel_softmax(
        output, dim=-1
    )


NOISE = {
    "normal": in_layers(lambda o: o + 0.1 * torch.randn_like(o), 0, 3),
    "stochastic depth": in_layers(lambda o: o * (torch.rand(1) > 0.3), 1, 2),
    "many": in_layers(many, 2),
    "embedding": embedded,
    "attention": attention_dropout,
    "loss": smoothed,
}


@pytest.mark.parametrize("kind", NOISE)
def test_noise_is_the_reference_s(kind: str, tmp_path: Path) -> None:
    """In a replay, and beside dropout in half of the cases."""
    dropout = 0.1 * (list(NOISE).index(kind) % 2)
    assert_equal(tmp_path, Script(NOISE[kind], lambda: tiny_model(dropout=dropout), recompute=True), exact=())


@pytest.mark.slow
def test_lockstep_and_two_equal_runs(tmp_path: Path) -> None:
    assert_equal(tmp_path, Script(NOISE["normal"]), exact=(), delayed=("lockstep", "pipelined", "pipelined"))


def twice(output: torch.Tensor) -> torch.Tensor:
    return checkpoint(torch.tanh, output, use_reentrant=False)


def noisy_gradient(output: torch.Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient + torch.randn_like(gradient))


GENERATOR = torch.Generator().manual_seed(1)
REFUSED: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "Python": (lambda o: o * random.random(), "draws from Python's random numbers (random)"),
    "NumPy": (lambda o: o * float(numpy.random.rand()), "draws from NumPy's random numbers"),
    "own generator": (lambda o: o * torch.rand(1, generator=GENERATOR), "draws from a generator of its own"),
    "seed": (lambda o: torch.manual_seed(0) and o, "calls torch.random.manual_seed"),
    "checkpoint": (twice, "uses torch.utils.checkpoint"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_tied_to_a_micro_batch_is_refused(kind: str, tmp_path: Path) -> None:
    change, why = REFUSED[kind]
    assert_refused(tmp_path, Script(in_layers(change)), why, ("pipelined", "reference"))


def test_noise_in_a_backward_is_refused(tmp_path: Path) -> None:
    """In the first backward: in a pipeline, later stages may have closed an update by then."""
    prepare = in_layers(noisy_gradient)
    assert_refused(tmp_path, Script(prepare), "drawn in a backward", ("reference",))
    trainer = Script().trainer(tmp_path, "pipelined")
    prepare(trainer)
    with pytest.raises(WorkerError, match="drawn in a backward"):
        trainer.train()


def test_noise_that_begins_late_is_named(tmp_path: Path) -> None:
    def prepare(trainer: Trainer) -> None:
        in_layers(lambda o: o * torch.rand(1) if trainer.state.global_step > 1 else o)(trainer)

    trainer = Script(prepare, max_steps=6).trainer(tmp_path, "pipelined")
    prepare(trainer)
    with pytest.raises(WorkerError, match="began to draw random numbers in the middle of training"):
        trainer.train()


def test_a_profiled_run(tmp_path: Path) -> None:
    """The watch of the first forwards takes the profiler's place for a while, and gives it back."""
    script = Script(NOISE["normal"])
    profiler = cProfile.Profile()
    profiled = profiler.runcall(script.run, tmp_path / "profiled", "reference")
    plain = script.run(tmp_path / "plain", "reference")
    assert isinstance(profiled, dict) and isinstance(plain, dict)
    assert differing(profiled, plain) == []
    names = {function for _, _, function in pstats.Stats(profiler).stats}
    assert "on_train_end" in names  # which is called after the watch
