"""What a script's callbacks, optimizers and subclasses do counts: as with Trainer where nothing is late, else as in the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainer_helpers import EVERY, assert_same, ouroboros, split_options, stock, tiny_model
from transformers import Trainer, TrainerCallback
from transformers.optimization import Adafactor, AdafactorSchedule

from hf_ouroboros import OuroborosTrainer
from hf_ouroboros.errors import EngineError, OuroborosError, UnsupportedOptionError, WorkerError

OPTIONS = {"max_steps": 6, "max_grad_norm": 0, "logging_steps": 1, "num_train_epochs": 3}
Made = dict[str, Any]


def built(make: Callable[[nn.Module], Made], ours: bool, tmp_path: Path, **options: Any) -> Trainer:
    """A trainer of either kind with what a script gives it."""
    model = tiny_model(dropout=0.0, layers=3)
    made = {"model": model, **make(model)}
    options = {**OPTIONS, **made.pop("options", {}), **options}
    mixin = made.pop("mixin", None)
    before = made.pop("before", None)
    if mixin is not None:
        base = OuroborosTrainer if ours else stock(tmp_path).__class__
        made["cls"] = type("Own", (mixin, base), {})
    trainer = ouroboros(tmp_path, made, **options) if ours else stock(tmp_path, made, **options)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Seeing):
            callback.trainer = trainer
    if before is not None:
        before(trainer)
    return trainer


def found_in(trainer: Trainer) -> list[Any]:
    return [c.seen for c in trainer.callback_handler.callbacks if isinstance(c, Seeing)]


class Seeing(TrainerCallback):
    """Has a list of what it saw, and the trainer."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.trainer: Any = None


class Clamps(Seeing):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                self.seen.append(p.double().sum().item())
                p.clamp_(-0.02, 0.02)


class Secretly(Seeing):
    """Holds weights under a name that tells nobody."""

    def __init__(self, weights: Any):
        super().__init__()
        self.secret = {"here": (weights,)}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for p in self.secret["here"][0]:
            p.data.mul_(0.9)


class Averages(Seeing):
    """An exponential mean that takes the weights' place during evaluation."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.mean = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for n, p in model.named_parameters():
            self.mean[n].lerp_(p.detach(), 0.3)
        if control.should_evaluate:
            self.kept = {n: p.data for n, p in model.named_parameters()}
            for n, p in model.named_parameters():
                p.data = self.mean[n].clone()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append({n: v.clone() for n, v in model.state_dict().items()})
        for n, p in model.named_parameters():
            p.data = self.kept[n]


class Freezes(Seeing):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for p in model.transformer.h[1].parameters():
            p.requires_grad_(state.global_step not in (2, 3))
        model.transformer.wte.weight.requires_grad_(state.global_step < 4)


class Masks(Seeing):
    """Gradients are looked at and changed before the step, and still there after it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for i, p in enumerate(model.parameters()):
            if p.grad is not None:
                self.seen.append(p.grad.clone())
                p.grad.mul_(i % 2) if i % 3 else setattr(p, "grad", None)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append([p.grad for p in model.parameters()])


class WithinUpdates(Seeing):
    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight.mul_(0.5)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.transformer.h[2].mlp.c_fc.weight.mul_(1.5)


class AddsGroups(Seeing):
    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step in (2, 4):
            layer = self.trainer.model.transformer.h[state.global_step // 2 - 1]
            optimizer.add_param_group({"params": list(layer.parameters()), "lr": 1e-2, "initial_lr": 1e-2})
            schedule = kwargs["lr_scheduler"]
            schedule.base_lrs.append(1e-2)
            schedule.lr_lambdas.append(lambda step: 1.0)


def adding_groups(model: nn.Module) -> Made:
    late = {id(p) for layer in model.transformer.h[:2] for p in layer.parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if id(p) not in late], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0])
    return {"callbacks": [AddsGroups()], "optimizers": (optimizer, schedule)}


class Resets(Seeing):
    """Momentum is forgotten, and the learning rate is the script's."""

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1 * state.global_step
        if state.global_step == 3:
            for entry in optimizer.state.values():
                entry["exp_avg"].zero_()


class StepInLoss:
    """A loss that reads the step, and what a callback sets."""

    weight = 1.0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs["loss"] * self.weight / (1 + self.state.global_step + self.state.epoch)
        return (loss, outputs) if return_outputs else loss


class SetsWeight(Seeing):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.weight = 1.0 + state.global_step % 3


class StepOfOnesOwn:
    """A training step around Trainer's, whose losses are looked at."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, {**inputs, "labels": inputs["labels"].roll(1, 0)}, *args, **kwargs)
        self.told = [*getattr(self, "told", []), loss.item()]
        return loss * 2


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer: every second step goes back half of the way."""

    def __init__(self, inner: torch.optim.Optimizer):
        super().__init__(inner.param_groups, inner.defaults)
        self.inside, self.count = inner, 0
        self.param_groups, self.state = inner.param_groups, inner.state
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    def load_state_dict(self, state_dict: Any) -> None:
        self.inside.load_state_dict(state_dict)
        self.param_groups, self.state = self.inside.param_groups, self.inside.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inside.step()
        self.count += 1
        if self.count % 2 == 0:
            for p, slow in zip((p for g in self.param_groups for p in g["params"]), self.slow, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class NormalisedSgd(torch.optim.Optimizer):
    """Divides by the norm of all gradients: no parameter is stepped by itself."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        given = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in given]).norm()
        for p in given:
            p.sub_(self.param_groups[0]["lr"] * p.grad / norm)


class CreatesOptimizer:
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.5)
        return self.optimizer


def constant(optimizer: torch.optim.Optimizer) -> Made:
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))}


def hooked(model: nn.Module) -> Made:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def after(*_: Any) -> None:
        with torch.no_grad():
            model.transformer.ln_f.bias.add_(0.01)

    optimizer.register_step_post_hook(after)
    return constant(optimizer)


class Hooks(Seeing):
    """Puts a hook on the optimizer that it is given."""

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            inner = optimizer.optimizer
            inner.register_step_post_hook(lambda *_: self.seen.append(state.global_step))


def adafactor(model: nn.Module) -> Made:
    optimizer = Adafactor(model.parameters(), relative_step=True, warmup_init=True, lr=None)
    return {"optimizers": (optimizer, AdafactorSchedule(optimizer))}


def changed_later(trainer: Trainer) -> None:
    """The model is another than the trainer was made with."""
    model = trainer.model
    trainer.args.max_steps = 4
    model.transformer.h[1].mlp = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    with torch.no_grad():
        model.transformer.h[1].mlp[0].weight.fill_(0.1)
        model.transformer.h[1].mlp[0].bias.fill_(0.0)
    model.lm_head = nn.Linear(16, model.config.vocab_size, bias=False)
    nn.init.ones_(model.lm_head.weight)
    model.config.tie_word_embeddings = False


CASES: dict[str, Callable[[nn.Module], Made]] = {
    "weights are clamped": lambda m: {"callbacks": [Clamps()]},
    "weights are written secretly": lambda m: {"callbacks": [Secretly(list(m.transformer.h.parameters()))]},
    "a mean is swapped in": lambda m: {
        "callbacks": [Averages()],
        "options": {"eval_strategy": "steps", "eval_steps": 2},
    },
    "layers are frozen for a while": lambda m: {"callbacks": [Freezes()]},
    "gradients are masked": lambda m: {"callbacks": [Masks()]},
    "weights are written at other times": lambda m: {"callbacks": [WithinUpdates()]},
    "groups are added": adding_groups,
    "momentum is forgotten": lambda m: {"callbacks": [Resets()]},
    "the loss reads the step": lambda m: {"mixin": StepInLoss, "callbacks": [SetsWeight()]},
    "a training step of one's own": lambda m: {"mixin": StepOfOnesOwn},
    "an optimizer wraps another": lambda m: constant(Lookahead(torch.optim.AdamW(m.parameters(), lr=1e-2))),
    "an optimizer looks at all gradients": lambda m: constant(NormalisedSgd(m.parameters())),
    "an optimizer has hooks": hooked,
    "an optimizer gets hooks later": lambda m: {"callbacks": [Hooks()]},
    "an optimizer is made by the script": lambda m: {"mixin": CreatesOptimizer},
    "the optimizer makes the schedule": adafactor,
    "the model is changed after construction": lambda m: {"before": changed_later},
}


def outcome(trainer: Trainer) -> list[Any]:
    """What callbacks and loggers saw."""
    logs = [(e["step"], e.get("loss"), e.get("learning_rate")) for e in trainer.state.log_history]
    return [found_in(trainer), getattr(trainer, "told", None), logs]


def differences(expected: Any, found: Any) -> list[Any]:
    if torch.is_tensor(expected):
        return [] if torch.equal(expected, found) else ["tensor"]
    if isinstance(expected, dict):
        return [d for key in expected for d in differences(expected[key], found[key])]
    if isinstance(expected, (list, tuple)):
        if len(expected) != len(found):
            return [(len(expected), len(found))]
        return [d for a, b in zip(expected, found, strict=True) for d in differences(a, b)]
    return [] if expected == found else [(expected, found)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_a_script_does_counts(tmp_path: Path, case: str) -> None:
    """Every third case also with one stage and in lockstep."""
    groups = [
        [
            (False, {}),
            (True, {"schedule": "1f1b", **split_options(3, 2)}),
            (True, {"schedule": "1f1b", **split_options(1, 1)}),
        ],
        [(True, {"schedule": s, **split_options(3, 2)}) for s in ("reference", "pipelined", "lockstep")],
    ]
    for group in groups:
        runs = []
        for ours, options in group if EVERY or list(CASES).index(case) % 3 == 0 else group[:2]:
            runs.append(built(CASES[case], ours, tmp_path, **options))
            runs[-1].train()
        for run in runs[1:]:
            assert differences(outcome(runs[0]), outcome(run)) == []
            assert_same(runs[0], run)


class Innocent(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = (state.global_step, args.learning_rate)


def test_a_callback_that_touches_nothing_does_not_make_the_pipeline_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = ouroboros(tmp_path, {"callbacks": [Innocent()]}, logging_strategy="no", **split_options(3, 2))
    rests = []
    from hf_ouroboros.engine.core import Engine

    rest = Engine.rest
    monkeypatch.setattr(Engine, "rest", lambda self: (rests.append(self.updates), rest(self)))
    trainer.train()
    assert set(rests) <= {0, 6}, "only before and after"


def test_the_model_is_in_training_mode_when_trainers_is(tmp_path: Path) -> None:
    class Modes(Seeing):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.seen.append(model.training)

        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Any, model: Any = None, **kwargs: Any
        ) -> None:
            self.seen.append(model.training)

    options = {"eval_strategy": "steps", "eval_steps": 2}
    runs = [built(lambda m: {"callbacks": [Modes()], "options": options}, ours, tmp_path) for ours in (False, True)]
    for run in runs:
        run.train()
    assert found_in(runs[0]) == found_in(runs[1])


class CallsTheModel:
    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class ReplacesAModule(Seeing):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.transformer.h[0].mlp.dropout = nn.Identity()


class GradientsWithinAnUpdate(Seeing):
    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen += [p.grad for p in model.parameters()]


REFUSED: dict[str, tuple[Callable[[nn.Module], Made], str]] = {
    "a step of one's own": (lambda m: {"mixin": CallsTheModel}, r"super\(\).training_step"),
    "a module": (
        lambda m: {"callbacks": [ReplacesAModule()]},
        r"ReplacesAModule.on_step_end has changed module .*mlp.dropout",
    ),
    "gradients": (lambda m: {"callbacks": [GradientsWithinAnUpdate()]}, "on_pre_optimizer_step"),
    "compensation": (
        lambda m: {**hooked(m), "options": {"delay_compensation": "lr_rescale"}},
        "step hooks.*delay_compensation='none'",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, make: Callable[[nn.Module], Made], message: str) -> None:
    with pytest.raises((UnsupportedOptionError, WorkerError, EngineError, OuroborosError), match=message):
        built(make, True, tmp_path, **split_options(3, 2)).train()


def test_dropout_may_be_changed_by_a_callback(tmp_path: Path) -> None:
    class LessDropout(Seeing):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.1 * (state.global_step % 3)

    runs = [
        built(lambda m: {"callbacks": [LessDropout()]}, True, tmp_path, schedule=s, **split_options(3, 2))
        for s in ("reference", "pipelined")
    ]
    for run in runs:
        run.train()
    assert_same(*runs)
    plain = built(lambda m: {}, True, tmp_path, schedule="pipelined", **split_options(3, 2))
    plain.train()
    with pytest.raises(AssertionError):
        assert_same(plain, runs[0])
