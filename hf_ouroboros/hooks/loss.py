"""The loss of a micro-batch on the last stage, by Trainer's own rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import Trainer

from ..engine.losses import HeadLoss
from ..partition import Targets, to_device
from ..staged import LogitsModel, head_targets


class LossContext(NamedTuple):
    """What the loss of a micro-batch needs from its update."""

    num_items: torch.Tensor | int | None
    accumulation_steps: int


class TrainerLoss(HeadLoss):
    """Labels, smoothing and custom losses as in Trainer; a head that can compute the stock loss does so.

    Args:
        trainer: whose `compute_loss` decides.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def targets(self, batch: Mapping[str, Any], context: LossContext) -> Targets | None:
        """The labels, if the head's own loss is what the trainer's would be."""
        return head_targets(batch, context.num_items) if head_computes_loss(self._trainer) else None

    def finish(self, loss: torch.Tensor, context: LossContext) -> torch.Tensor:
        """The loss in the scale of its update."""
        trainer = self._trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = context.num_items is not None or trainer.compute_loss_func is not None
        if trainer._counts_all_replicas and context.num_items is not None:
            loss = loss * trainer._grid.replicas  # gradients and losses are averaged over the replicas
        return loss if scaled else loss / context.accumulation_steps

    def __call__(self, logits: torch.Tensor, batch: Mapping[str, Any], context: LossContext) -> torch.Tensor:
        """Loss of logits [batch, time, vocabulary]."""
        trainer, head = self._trainer, LogitsModel(self._trainer.model, logits)
        inputs = to_device(batch, logits.device)
        return self.finish(trainer.compute_loss(head, inputs, num_items_in_batch=context.num_items), context)


def head_computes_loss(trainer: Any) -> bool:
    """Whether the model's head can compute the loss that this trainer wants."""
    stock = trainer.compute_loss_func is None and type(trainer).compute_loss is Trainer.compute_loss
    return stock and trainer.label_smoother is None and trainer._partition.stages[0].family.computes_loss
