"""Hooks that a script has put on parameters and modules for their gradients.

Those on parameters are called with the gradient of a micro-batch when it is added to its update. A stage computes with leaves
of its own (`weights.py`), on which they are not; and when the gradient is added, they see the parameter as the reference has
it then, whatever the schedule. At a delay of 0 that is what stock Trainer does.

Those on modules are called in the backward, by autograd, with the weights of the forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..errors import UnsupportedOptionError
from .divided import DividedBackward
from .noise import NoDraws, own_draws
from .settings import EngineSettings


def hooked(
    parameter: nn.Parameter, gradient: torch.Tensor, seed: int, stage: int, tick: int, name: str
) -> torch.Tensor:
    """A gradient after the parameter's hooks (`register_hook`), which draw from (seed, stage, tick, name).

    Args:
        parameter: whose gradient.
        gradient: of one micro-batch.
        seed: of the run.
        stage: that owns the parameter.
        tick: the micro-batch.
        name: of the parameter.
    """
    if not parameter._backward_hooks:
        return gradient
    with torch.no_grad(), own_draws(seed, stage, tick, name, parameter.device):
        for hook in list(parameter._backward_hooks.values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
    return gradient


def accumulated(parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor | None:
    """An update's gradient so far, after the parameter's hooks that look at it (`register_post_accumulate_grad_hook`).

    Args:
        parameter: whose gradient.
        gradient: the sum.

    Returns:
        The gradient that is left; None for none.
    """
    if not parameter._post_accumulate_grad_hooks:
        return gradient
    before, parameter.grad = parameter.grad, gradient
    with torch.no_grad():
        for hook in list(parameter._post_accumulate_grad_hooks.values()):
            hook(parameter)
    left, parameter.grad = parameter.grad, before
    return left


@contextmanager
def silenced(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within this context, a backward does not call the hooks of parameters."""
    hooks = [h for p in parameters for h in (p._backward_hooks, p._post_accumulate_grad_hooks) if h]
    kept = [(found, dict(found)) for found in hooks]
    try:
        for found, _ in kept:
            found.clear()
        yield
    finally:
        for found, before in kept:
            found.update(before)


def refuse_on_halves(tied: Mapping[str, nn.Parameter], settings: EngineSettings) -> None:
    """Refuses hooks on matrices whose two sides come at different ticks.

    Raises:
        UnsupportedOptionError: there is one, and tied_gradient="paper".
    """
    for name, parameter in tied.items() if settings.tied_gradient == "paper" else ():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UnsupportedOptionError(
                f"a hook is registered on {name}, whose gradient comes in two halves at different micro-batches with "
                "tied_gradient='paper'; use tied_gradient='joint'"
            )


def calls_backward_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether a backward calls hooks that are on modules."""
    return any(part._backward_hooks or part._backward_pre_hooks for part in modules)


def stage_backward(
    stage: nn.Module,
    weights: Mapping[str, torch.Tensor] | None,
    outputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    silent: Iterable[nn.Parameter],
    watched: bool,
    hooks_watched: bool = False,
) -> None:
    """Gradients of the leaves of a stage's forward.

    Args:
        stage: the stage.
        weights: of the forward, which hooks on modules see that look at theirs; None where there are no such hooks.
        outputs: of the forward.
        gradients: of the loss with respect to them.
        silent: parameters that are leaves themselves, whose hooks are called later.
        watched: whether to find out if random numbers are drawn; where there are hooks, that is always found out.
        hooks_watched: whether somebody watches what is computed in hooks.
    """
    with ExitStack() as scopes:
        scopes.enter_context(silenced(silent))
        if weights is not None or watched:
            scopes.enter_context(NoDraws())
        if weights is not None:
            weights = {f"stage.{name}": weight for name, weight in weights.items()}
            functional_call(_Backward(stage), weights, (outputs, gradients), tie_weights=False)
        else:
            _run(outputs, gradients, hooks_watched)


def _run(
    outputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    hooks_watched: bool = True,
    **options: Any,
) -> None:
    """As `torch.autograd.backward`, which, of tensors, would hide what hooks do from those who watch it (`reads.py`)."""
    if not hooks_watched:
        torch.autograd.backward(outputs, gradients, **options)
        return
    given = [torch.ones_like(o) if g is None else g for o, g in zip(outputs, gradients, strict=True)]
    torch.autograd.backward([torch.autograd.graph.get_gradient_edge(output) for output in outputs], given, **options)


def first_part(
    divided: DividedBackward, gradients: Sequence[torch.Tensor | None], watched: bool, hooks_watched: bool
) -> None:
    """The first part of a divided backward, in which there are no hooks of a script on modules.

    Args:
        divided: the backward.
        gradients, watched, hooks_watched: as for `stage_backward`.
    """
    with NoDraws() if watched else nullcontext():
        divided.run_first(partial(_run, hooks_watched=hooks_watched), gradients)


def second_part(divided: DividedBackward, watched: bool) -> None:
    """The second part, likewise."""
    with NoDraws() if watched else nullcontext():
        divided.run_second()


class _Backward(nn.Module):
    """A backward as the forward of a module, so that a stage's weights can be exchanged for it."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
        """Computes gradients."""
        _run(outputs, gradients)
