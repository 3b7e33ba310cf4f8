"""The loss of a micro-batch on the last stage, by Trainer's own rules, of the model's own forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import Trainer

from ..engine.losses import LossOfModel
from ..partition import ModelCall
from ..staged import HeadModel


class LossContext(NamedTuple):
    """What the loss of a micro-batch needs from its update."""

    num_items: torch.Tensor | int | None
    accumulation_steps: int


class TrainerLoss(LossOfModel):
    """Labels, smoothing and custom losses as in Trainer, which calls the model as it always does.

    Args:
        trainer: whose `compute_loss` decides.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def __call__(self, model: ModelCall, inputs: dict[str, Any], context: LossContext) -> torch.Tensor:
        """See `LossOfModel`."""
        trainer = self._trainer
        partition = trainer._partition
        needs_logits = partition.stages[-1].family.computes_loss and not head_computes_loss(trainer)
        head = HeadModel(partition.model, model, needs_logits)
        loss = trainer.compute_loss(head, inputs, num_items_in_batch=context.num_items)
        if trainer._counts_all_replicas and context.num_items is not None:
            loss = loss * trainer._grid.replicas  # gradients and losses are averaged over the replicas
        return loss if self._is_scaled(context) else loss / context.accumulation_steps

    def _is_scaled(self, context: LossContext) -> bool:
        """Whether the loss is in the scale of its update already, as Trainer's training step asks."""
        trainer = self._trainer
        declared = getattr(trainer, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        by_model = trainer.model_accepts_loss_kwargs and context.num_items is not None
        return by_model or trainer.compute_loss_func is not None


def head_computes_loss(trainer: Any) -> bool:
    """Whether calling the model with labels gives the loss that this trainer wants, so that nobody needs logits."""
    stock = trainer.compute_loss_func is None and type(trainer).compute_loss is Trainer.compute_loss
    return stock and trainer.label_smoother is None
