"""One optimizer per stage, cut out of the user's optimizer, so that stages step on their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..errors import UnsupportedModelError, UnsupportedOptionError
from ..optim import Compensation, StageUpdate, compensated_step, predictions
from .settings import Hyperparameters


class StageOptimizer:
    """Steps the parameters of one stage exactly as the complete optimizer would.

    The slice is a shallow copy: it shares the complete optimizer's `state` dict (whose keys are Parameters), so
    the complete optimizer's `state_dict()` stays the stock one.

    Args:
        optimizer: the optimizer of the whole model.
        parameters: the parameters of this stage.
        compensations: what is done about the delay.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        compensations: Sequence[Compensation] = (),
    ):
        self._compensations = compensations
        self._own = {id(parameter) for parameter in parameters}
        slice_ = object.__new__(type(optimizer))
        slice_.__dict__.update(optimizer.__dict__)
        slice_.__dict__.pop("step", None)  # a learning rate scheduler's wrapper around the complete optimizer
        groups = [
            {**group, "params": [p for p in group["params"] if id(p) in self._own]} for group in optimizer.param_groups
        ]
        self._indices = [i for i, group in enumerate(groups) if group["params"]]
        slice_.param_groups = [groups[i] for i in self._indices]
        self._optimizer = slice_

    def step(
        self,
        gradients: Sequence[tuple[nn.Parameter, torch.Tensor]],
        hyperparameters: Hyperparameters,
        update: StageUpdate,
    ) -> None:
        """Applies gradients with the learning rates of their update; parameters without one are left alone."""
        for index, group in zip(self._indices, self._optimizer.param_groups, strict=True):
            group.update(hyperparameters[index])
        compensated_step(self._optimizer, gradients, self._compensations, update)

    def predictions(self, hyperparameters: Hyperparameters, update: StageUpdate) -> dict[int, torch.Tensor]:
        """What the forwards of an update use instead of the real weights, by the id of the parameter."""
        own = [hyperparameters[index] for index in self._indices]
        return predictions(self._optimizer, own, self._own, self._compensations, update)


def snapshot_hyperparameters(optimizer: torch.optim.Optimizer) -> Hyperparameters:
    """The optimizer's present hyper-parameters, per group, without the parameters."""
    return [
        {k: v.clone() if torch.is_tensor(v) else v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]


def check_optimizer(optimizer: torch.optim.Optimizer, known: Iterable[nn.Parameter]) -> None:
    """Refuses optimizers that can't work stage by stage.

    Raises:
        UnsupportedOptionError: it needs a closure, swaps weights for evaluation, or holds foreign parameters.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedOptionError("optimizer LBFGS re-evaluates the whole model in each step; use another optimizer")
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise UnsupportedOptionError(
            f"optimizer {name} swaps the weights between training and evaluation (schedule-free), which in-flight "
            "micro-batches don't allow; use another optimizer"
        )
    ids = {id(parameter) for parameter in known}
    if any(id(p) not in ids for group in optimizer.param_groups for p in group["params"]):
        raise UnsupportedOptionError(
            f"optimizer {name} holds parameters that are not the model's; build it from trainer.model.parameters() "
            "of the model given to the trainer"
        )


def check_trainable(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuses a run in which nothing would be trained.

    Raises:
        UnsupportedModelError: no parameter requires a gradient.
        UnsupportedOptionError: none of those that do is the optimizer's.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UnsupportedModelError(
            f"no parameter of this {type(model).__name__} requires a gradient, so there is nothing to train; unfreeze some "
            "(parameter.requires_grad = True)"
        )
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise UnsupportedOptionError(
            f"optimizer {type(optimizer).__name__} holds no parameter that requires a gradient, so there is nothing to "
            "train; build it from the parameters that are not frozen"
        )
