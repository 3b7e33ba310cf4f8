"""The loss of a micro-batch on the last stage, by Trainer's own rules, of the model's own forward."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import nn
from transformers import Trainer

from ..engine.losses import LossOfModel
from ..errors import EngineError
from ..head_model import HeadModel
from ..partition import ModelCall
from ..partition.late_logits import LARGE_VOCABULARY, only_loss_wanted
from ..partition.module_hooks import OURS
from ..precision import autocast_dtype
from .interfaces import SplitTrainer


class LossContext(NamedTuple):
    """What the loss of a micro-batch needs from its update."""

    num_items: torch.Tensor | int | None
    accumulation_steps: int


Context = TypeVar("Context", bound=LossContext)


class TrainerLoss(LossOfModel, Generic[Context]):
    """Labels, smoothing and custom losses as in Trainer, which calls the model as it always does.

    Args:
        trainer: whose `compute_loss` decides.
    """

    def __init__(self, trainer: SplitTrainer):
        self._trainer = trainer

    @property
    def is_of_script(self) -> bool:
        """Whether more than the model computes it."""
        return not head_computes_loss(self._trainer)

    def __call__(self, model: ModelCall, inputs: dict[str, Any], context: Context) -> torch.Tensor:
        """See `LossOfModel`."""
        trainer = self._trainer
        alone, partition = trainer.stage_plan.num_stages == 1, trainer._partition
        without_labels = partition.stages[-1].family.computes_loss and not head_computes_loss(trainer)
        head = HeadModel(partition.model, model, without_labels, alone=alone)
        count = context.num_items
        if isinstance(count, torch.Tensor):  # from memory of the host that no accelerator has to wait for
            count = count.to(self._device, non_blocking=True)
        late = head_computes_loss(trainer) and has_late_logits(trainer)
        with contextlib.nullcontext() if alone else _refused_here(trainer.model), only_loss_wanted(late):
            found = trainer.compute_loss(head, inputs, num_items_in_batch=count)
        loss = cast(torch.Tensor, found)  # as no outputs are asked for
        if trainer._counts_all_replicas and context.num_items is not None:
            loss = loss * trainer._processes.replicas  # gradients and losses are averaged over the replicas
        return loss if self._is_scaled(context) else loss / context.accumulation_steps

    @cached_property
    def _device(self) -> torch.device:
        """Where the last stage computes; to look through its modules in each micro-batch would take time."""
        return self._trainer._partition.stages[-1].device

    def _is_scaled(self, context: LossContext) -> bool:
        """Whether the loss is in the scale of its update already, as Trainer's training step asks."""
        trainer = self._trainer
        declared = getattr(trainer, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        by_model = trainer.model_accepts_loss_kwargs and context.num_items is not None
        return by_model or trainer.compute_loss_func is not None


@contextlib.contextmanager
def _refused_here(model: nn.Module) -> Iterator[None]:
    """Within this context, in this thread, the complete model refuses to run: its weights are those of other moments."""
    here = threading.get_ident()

    def refuse(module: nn.Module, *inputs: Any) -> None:
        if threading.get_ident() == here:
            raise EngineError(
                f"the loss calls the trainer's {type(module).__name__} itself, whose stages are at other moments; call the "
                "model that compute_loss gets, once, or a copy made before training, or train with num_stages=1"
            )

    vars(refuse)[OURS] = True
    handle = model.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def has_late_logits(trainer: SplitTrainer) -> bool:
    """Whether the head is not to build logits where nobody looks at them."""
    if trainer.options.fused_head == "auto":
        if autocast_dtype(trainer.options) is torch.float16:  # gradients have to be computed of the scaled loss
            return False
        return trainer._partition.model.config.get_text_config().vocab_size >= LARGE_VOCABULARY
    return trainer.options.fused_head == "on"


def head_computes_loss(trainer: Trainer) -> bool:
    """Whether calling the model with labels gives the loss that this trainer wants, so that nobody needs logits."""
    stock = trainer.compute_loss_func is None and type(trainer).compute_loss is Trainer.compute_loss
    return stock and trainer.label_smoother is None
