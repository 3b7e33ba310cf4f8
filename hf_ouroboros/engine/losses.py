"""The loss on the last stage: from the logits, or by the head itself, which then need not build them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import UnsupportedOptionError
from ..partition import Targets, to_device

LossFunction = Callable[[torch.Tensor, Mapping[str, Any], Any], torch.Tensor]
"""(logits [batch, time, vocabulary], micro-batch, whatever was submitted with it) -> scalar loss."""


class HeadLoss(ABC):
    """A loss function for models whose head can compute the loss: an adaptive softmax never builds all logits."""

    @abstractmethod
    def targets(self, batch: Mapping[str, Any], context: Any) -> Targets | None:
        """What the head computes this micro-batch's loss from; None if the logits are wanted."""

    @abstractmethod
    def finish(self, loss: torch.Tensor, context: Any) -> torch.Tensor:
        """The micro-batch's loss in the scale of its update, of what the head computed."""

    @abstractmethod
    def __call__(self, logits: torch.Tensor, batch: Mapping[str, Any], context: Any) -> torch.Tensor:
        """The loss where the logits were wanted."""


def targets_for(loss_fn: LossFunction, batch: Mapping[str, Any], context: Any, device: torch.device) -> Targets | None:
    """What the last stage is given to compute the loss from; None if it has to give the logits."""
    targets = loss_fn.targets(batch, context) if isinstance(loss_fn, HeadLoss) else None
    return None if targets is None else to_device(targets, device)


def loss_of(
    loss_fn: LossFunction, output: torch.Tensor, targets: Targets | None, batch: Mapping[str, Any], context: Any
) -> torch.Tensor:
    """The loss, of what the last stage put out: the head's loss where it had targets, else logits.

    Raises:
        UnsupportedOptionError: it does not depend on what is trained, so that no gradient would ever come.
    """
    loss = loss_fn(output, batch, context) if targets is None else loss_fn.finish(output, context)
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise UnsupportedOptionError(
            "the loss does not depend on any parameter that is trained, so nothing would ever change: a compute_loss_func or "
            "compute_loss must give a loss with its graph (no detach(), item() or torch.no_grad())"
        )
    return loss
