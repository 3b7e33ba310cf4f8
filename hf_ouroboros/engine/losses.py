"""The loss on the last stage: of its logits, or of whatever calling the model gives."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import UnsupportedOptionError
from ..partition import Finish, ModelCall, to_device
from .graph import Node, nodes_of, refuse_hooks_on_saved_tensors
from .reads import ReadCheck

LossOfLogits = Callable[[torch.Tensor, Mapping[str, Any], Any], torch.Tensor]
"""(logits [batch, time, vocabulary], micro-batch, whatever was submitted with it) -> scalar loss."""


class LossOfModel(ABC):
    """A loss function that calls the model itself, as a script's training step does."""

    @property
    def is_of_script(self) -> bool:
        """Whether code of a script's own is in it, besides the model's."""
        return True

    @abstractmethod
    def __call__(self, model: ModelCall, inputs: dict[str, Any], context: Any) -> torch.Tensor:
        """The scalar loss of a micro-batch.

        Args:
            model: called once, with all inputs that the stages compute with, and with labels or whatever else it takes.
            inputs: the micro-batch, on the last stage's device; a dict of its own.
            context: whatever was submitted with it.
        """


LossFunction = LossOfLogits | LossOfModel


def finishing(
    loss_fn: LossFunction,
    batch: Mapping[str, Any],
    selected: Mapping[str, torch.Tensor],
    context: Any,
    device: torch.device,
    check: Callable[[torch.Tensor, set[Node]], None] | None = None,
    reads: ReadCheck | None = None,
) -> Finish:
    """What the last stage does with the model.

    Args:
        loss_fn: gives the loss.
        batch: the micro-batch, wherever it is.
        selected: the part of it that the stages compute with, on the device.
        context: submitted with it.
        device: of the last stage.
        check: told the loss, and where the graphs of what the model has put out begin; None for a single stage.
        reads: told what a script's loss reads.

    Raises:
        UnsupportedOptionError: when it runs, if the loss does not depend on what is trained, so that no gradient would ever
            come.
    """

    def finish(model: ModelCall) -> torch.Tensor:
        outputs: set[Node] = set()

        def noted(*args: Any, **inputs: Any) -> Any:
            if check is not None:
                refuse_hooks_on_saved_tensors("a loss calls the model")
            with contextlib.nullcontext() if reads is None else reads.call():
                output = model(*args, **inputs)
            outputs.update(nodes_of(output))
            return output

        own = isinstance(loss_fn, LossOfModel) and loss_fn.is_of_script
        with reads.loss() if own and reads is not None else contextlib.nullcontext():
            if isinstance(loss_fn, LossOfModel):
                rest = {key: value for key, value in batch.items() if key not in selected}
                loss = loss_fn(noted, {**to_device(rest, device), **selected}, context)
            else:
                loss = loss_fn(noted(**selected).logits, batch, context)
            if torch.is_grad_enabled() and not loss.requires_grad:
                raise UnsupportedOptionError(
                    "the loss does not depend on any parameter that is trained, so nothing would ever change: a "
                    "compute_loss_func or compute_loss must give a loss with its graph (no detach(), item() or torch.no_grad())"
                )
            if check is not None and torch.is_grad_enabled():
                check(loss, outputs)
            return loss

    return finish
