"""One optimizer step, and the weights of the next forwards, with compensations: the same for engine and reference."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .compensation import Compensation, StageUpdate


@torch.no_grad()
def compensated_step(
    optimizer: torch.optim.Optimizer,
    gradients: Sequence[tuple[nn.Parameter, torch.Tensor]],
    compensations: Sequence[Compensation],
    update: StageUpdate,
) -> None:
    """Steps the parameters of a stage; those without a gradient are left alone.

    Args:
        optimizer: any that skips parameters without gradient, with the update's hyper-parameters in its groups.
        gradients: of one stage, clipped.
        compensations: applied in this order.
        update: which update of the stage this is.
    """
    keep = any(c.keeps_weights(update) for c in compensations)
    before = {id(p): p.detach().clone() for p, _ in gradients} if keep else {}
    given: list[list[torch.Tensor]] = []
    for parameter, gradient in gradients:
        given.append([])
        for compensation in compensations:
            given[-1].append(gradient)
            gradient = compensation.correct(parameter, gradient, optimizer.state.get(parameter, {}), update)
        parameter.grad = gradient
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            if (factor := _factor(compensations, group, update)) != 1.0:
                group["lr"] = group["lr"] * factor
        optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter, _ in gradients:
            parameter.grad = None
    for (parameter, _), received in zip(gradients, given, strict=True):
        for compensation, gradient in zip(compensations, received, strict=True):
            compensation.record(
                parameter.detach(), gradient, before.get(id(parameter)), optimizer.state[parameter], update
            )


@torch.no_grad()
def predictions(
    optimizer: torch.optim.Optimizer,
    hyperparameters: Sequence[Mapping[str, Any]],
    owned: Collection[int],
    compensations: Sequence[Compensation],
    update: StageUpdate,
) -> dict[int, torch.Tensor]:
    """What the forwards of an update use instead of the real weights, by the id of the parameter.

    Args:
        optimizer: with the state after the update before.
        hyperparameters: of each of its groups, when the update opened.
        owned: ids of the stage's parameters.
        compensations: at most one of them predicts.
        update: which update of the stage this is.
    """
    found: dict[int, torch.Tensor] = {}
    for compensation in compensations:
        if not compensation.predicts:
            continue
        for group, values in zip(optimizer.param_groups, hyperparameters, strict=True):
            values = {**values, "lr": values["lr"] * _factor(compensations, group, update)}
            for parameter in group["params"]:
                if id(parameter) not in owned or not parameter.requires_grad:
                    continue
                predicted = compensation.predict(parameter.detach(), optimizer.state.get(parameter, {}), values, update)
                if predicted is not None:
                    found[id(parameter)] = predicted
    return found


def _factor(compensations: Sequence[Compensation], group: Mapping[str, Any], update: StageUpdate) -> float:
    return math.prod(c.learning_rate_factor(group, update) for c in compensations)
