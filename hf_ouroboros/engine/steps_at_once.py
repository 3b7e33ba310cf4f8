"""Optimizers that need all gradients at once: those that wrap another, have hooks, or do not step each parameter by itself."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers.optimization import AdafactorSchedule

State = defaultdict[torch.Tensor, Any]
_KNOWN = ("torch", "transformers", __name__.split(".")[0])


def has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody wants to be told of its steps."""
    return bool(
        getattr(optimizer, "_optimizer_step_pre_hooks", None) or getattr(optimizer, "_optimizer_step_post_hooks", None)
    )


def why_at_once(optimizer: torch.optim.Optimizer, scheduler: Any = None, trusted: bool = False) -> str | None:
    """Why an optimizer can't be stepped stage by stage, each of them without knowing of the others; None if it can.

    Args:
        optimizer: of the whole model.
        scheduler: of its learning rates.
        trusted: whether it is one of those that Trainer makes, which step each parameter by itself.
    """
    name = type(optimizer).__name__
    if has_hooks(optimizer):
        return f"optimizer {name} has step hooks, which are called once in an update"
    step = vars(optimizer).get("step")
    if step is not None and not getattr(step, "_wrapped_by_lr_sched", False):
        return f"optimizer {name} has a step of its own put in the place of its class's"
    if isinstance(getattr(scheduler, "scheduler", scheduler), AdafactorSchedule):
        return f"the scheduler of optimizer {name} asks it for learning rates, which it takes from the gradients"
    if trusted or type(optimizer).__module__.split(".")[0] in _KNOWN:
        return None
    if any(isinstance(value, torch.optim.Optimizer) for value in _values(optimizer)):
        return f"optimizer {name} wraps another one"
    if not _steps_each_by_itself(optimizer):
        return f"optimizer {name} does not step each parameter by itself"
    return None


def _values(optimizer: torch.optim.Optimizer) -> list[Any]:
    values = [value for value in vars(optimizer).values() if value is not optimizer]
    for value in list(values):
        if isinstance(value, (list, tuple)):
            values += value
        elif isinstance(value, dict):
            values += value.values()
    return values


def _steps_each_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Tries it on two small matrices: together, and one by one."""
    found = []
    try:
        with torch.random.fork_rng(devices=[]):
            for groups in ([[0, 1]], [[0], [1]]):
                matrices = [nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (k + 1)) for k in range(2)]
                state: State = defaultdict(dict)
                twins = [_twin(optimizer, [matrices[k] for k in group], state) for group in groups]
                for scale in (1.0, 10.0):
                    for twin, group in zip(twins, groups, strict=True):
                        for k in group:
                            matrices[k].grad = torch.tensor([[0.1, -0.2], [0.3, 0.4]]) * scale * (1 + 2 * k)
                        twin.step()
                        for k in group:
                            matrices[k].grad = None
                found.append([matrix.detach() for matrix in matrices])
    except Exception:  # whatever it needs that small matrices don't have
        return False
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _twin(optimizer: torch.optim.Optimizer, matrices: list[nn.Parameter], state: State) -> torch.optim.Optimizer:
    """An optimizer of the same kind for other parameters, made as the slices of the stages are."""
    twin = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        twin.__dict__[name] = value.clone() if torch.is_tensor(value) else copy.copy(value)
    twin.__dict__.pop("step", None)
    twin.state = state
    options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    twin.param_groups = [{**options, "params": matrices}]
    return twin
