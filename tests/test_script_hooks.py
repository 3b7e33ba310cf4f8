"""Hooks of a script, on parameters and on modules: they mean what they mean in stock Trainer, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from script_runs import DELAYED, EXACT, Script, assert_equal, assert_refused
from torch import nn
from trainer_helpers import tiny_model
from transformers import Trainer

FIRST, LAST = "transformer.h.0.mlp.c_fc.weight", "lm_head.weight"


def on_parameter(name: str, hook: Callable[..., Any], post: bool = False) -> Callable[[Trainer], None]:
    def prepare(trainer: Trainer) -> None:
        parameter = trainer.model.get_parameter(name)
        (parameter.register_post_accumulate_grad_hook if post else parameter.register_hook)(hook)

    return prepare


def on_module(name: str, kind: str, hook: Callable[..., Any], **options: Any) -> Callable[[Trainer], None]:
    return lambda trainer: getattr(trainer.model.get_submodule(name), f"register_{kind}_hook")(hook, **options)


def weighed(trainer: Trainer) -> None:
    """A hook that looks at its parameter: as it is when the gradient is added to its update."""
    parameter = trainer.model.get_parameter(FIRST)
    parameter.register_hook(lambda gradient: gradient * parameter.abs())


def clamped(parameter: nn.Parameter) -> None:
    parameter.grad.clamp_(-1e-4, 1e-4)


PARAMETERS = {
    "first stage": on_parameter(FIRST, lambda gradient: gradient.clamp(-1e-4, 1e-4)),
    "last stage": on_parameter(LAST, lambda gradient: gradient.clamp(-1e-4, 1e-4)),
    "in place": on_parameter(FIRST, lambda gradient: (gradient.mul_(0.5), None)[1]),
    "looks at the parameter": weighed,
    "after accumulation": on_parameter(FIRST, clamped, post=True),
    "no gradient is left": on_parameter(FIRST, lambda parameter: setattr(parameter, "grad", None), post=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PARAMETERS)
def test_hooks_on_parameters(kind: str, tmp_path: Path) -> None:
    assert_equal(tmp_path, Script(PARAMETERS[kind]), exact=EXACT if "after" in kind else ("1f1b",))


def test_noise_on_gradients(tmp_path: Path) -> None:
    script = Script(on_parameter(FIRST, lambda gradient: gradient + torch.randn_like(gradient)), recompute=True)
    assert_equal(tmp_path, script, exact=())


def test_hook_on_a_tied_matrix(tmp_path: Path) -> None:
    """It gets the sum of both sides."""
    prepare = on_parameter("transformer.wte.weight", lambda gradient: gradient.clamp(-1e-4, 1e-4))
    assert_equal(tmp_path, Script(prepare, model=lambda: tiny_model(dropout=0.0)), exact=())


def test_hook_on_two_halves_is_refused(tmp_path: Path) -> None:
    prepare = on_parameter("transformer.wte.weight", lambda gradient: gradient.clamp(-1e-4, 1e-4))
    script = Script(prepare, model=lambda: tiny_model(dropout=0.0), tied_gradient="paper")
    assert_refused(tmp_path, script, "a hook is registered on transformer.wte.weight", ("lockstep", "reference"))


def scaled(module: Any, inputs: Any, output: Any) -> Any:
    return (output[0] * 0.9, *output[1:]) if isinstance(output, tuple) else output * 0.9


def halved_loss(module: Any, inputs: Any, output: Any) -> Any:
    if output.loss is not None:
        output.loss = output.loss * 0.5
    return output


def by_its_weights(module: Any, before: Any, after: Any) -> Any:
    return (before[0] * (1 + module.c_fc.weight.mean()),)


MODULES = {
    "the model": on_module("", "forward", halved_loss),
    "around the layers": on_module("transformer", "forward", lambda m, i, o: type(o)(last_hidden_state=o[0] * 0.5)),
    "embedding": on_module("transformer.wte", "forward", scaled),
    "last layer of a stage": on_module("transformer.h.1", "forward", scaled),
    "before the first layer of a stage": on_module("transformer.h.2", "forward_pre", lambda m, i: (i[0] * 0.9, *i[1:])),
    "last layer": on_module("transformer.h.4", "forward", scaled),
    "norm": on_module("transformer.ln_f", "forward", scaled),
    "head": on_module("lm_head", "forward", scaled),
    "gradients": on_module("transformer.h.1.mlp", "full_backward", by_its_weights),
    "before gradients": on_module("transformer.h.4.mlp", "full_backward_pre", lambda m, g: (g[0] * 0.5,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODULES)
def test_hooks_on_modules(kind: str, tmp_path: Path) -> None:
    assert_equal(tmp_path, Script(MODULES[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["around the layers", "last layer"])
def test_a_stage_that_ends_before_norm_or_head(kind: str, tmp_path: Path) -> None:
    """[2, 3, 0]: norm and head are a stage of their own."""
    assert_equal(tmp_path, Script(MODULES[kind], device_map=[2, 3, 0]), exact=("1f1b",))


def one_more(module: Any, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "input_ids": (kwargs["input_ids"] + 1) % 61}


def on_nodes(trainer: Trainer) -> None:
    """Hooks on hidden states and on nodes of the graph, also where stages end."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.grad_fn is not None:
            hidden.register_hook(lambda gradient: gradient * 0.5)
            hidden.grad_fn.register_prehook(lambda gradients: tuple(g if g is None else g * 1.5 for g in gradients))

    for layer in trainer.model.transformer.h:
        layer.register_forward_hook(hook)


class OnTheLoss:
    """Hooks on the loss, its node and the logits."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        outputs = model(**inputs)
        outputs.logits.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        outputs.loss.register_hook(lambda gradient: gradient * 0.3)
        outputs.loss.grad_fn.register_prehook(lambda gradients: (gradients[0] * 0.5,))
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved * 1.5, lambda saved: saved):
            return outputs.loss + outputs.logits.square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_hooks_in_the_graph(recompute: bool, tmp_path: Path) -> None:
    assert_equal(tmp_path, Script(on_nodes, mixin=OnTheLoss, recompute=recompute), exact=EXACT)


class OnWhatIsSaved:
    """Changes what backwards need."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(), lambda saved: saved):
            return model(**inputs).loss


class AroundTraining:
    """Saves activations on the CPU."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.train`."""
        with torch.autograd.graph.save_on_cpu():
            return super().train(*args, **kwargs)


def test_hooks_on_what_is_saved(tmp_path: Path) -> None:
    why = "within torch.autograd.graph.saved_tensors_hooks"
    assert_refused(tmp_path, Script(mixin=OnWhatIsSaved), f"a loss calls the model {why}")
    assert_equal(tmp_path, Script(mixin=OnWhatIsSaved), exact=("alone",), delayed=())
    assert_refused(tmp_path, Script(mixin=AroundTraining), f"train() is called {why}", ("alone", "1f1b"))


REFUSED = {
    "before the model": (
        on_module("", "forward_pre", one_more, with_kwargs=True),
        "itself, whose layers are in several",
    ),
    "before the layers": (
        on_module("transformer", "forward_pre", lambda m, i: None),
        "registered on transformer of this",
    ),
    "gradients of all layers": (on_module("transformer", "full_backward", lambda m, i, o: None), "on its gradients is"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_stage_sees_is_refused(kind: str, tmp_path: Path) -> None:
    prepare, why = REFUSED[kind]
    assert_refused(tmp_path, Script(prepare), why)
    assert_equal(tmp_path, Script(prepare), exact=("alone",), delayed=())


def test_hooks_on_all_modules_are_refused(tmp_path: Path) -> None:
    handles = []

    def everywhere(trainer: Trainer) -> None:
        handles.append(nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None))

    try:
        assert_refused(tmp_path, Script(everywhere), "registered on all modules", ("alone", "pipelined"))
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "transformer", "transformer.h.0", "transformer.h.4"])
def test_hooks_are_called_as_often_as_in_stock_trainer(name: str, tmp_path: Path) -> None:
    counts = []
    for kind in ("stock", *EXACT, *DELAYED):
        calls: list[int] = []
        assert isinstance(
            Script(on_module(name, "forward", lambda m, i, o, calls=calls: calls.append(1))).run(tmp_path, kind), dict
        )
        counts.append(len(calls))
    assert counts == [counts[0]] * 5 and counts[0] > 0
