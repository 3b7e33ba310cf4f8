"""The state of a run as a loss sees it: that of the step its micro-batch belongs to, however late it is computed."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerState

from ..partition import ModelCall
from .loss import LossContext, TrainerLoss

_of_this_thread = threading.local()


class LateState(TrainerState):
    """Trainer's state, whose step and epoch are, in a thread that computes the loss of a micro-batch, those of its step."""

    @property
    def global_step(self) -> int:
        """Updates made so far."""
        moment = getattr(_of_this_thread, "moment", None)
        return self.__dict__["global_step"] if moment is None else moment[0]

    @global_step.setter
    def global_step(self, value: int) -> None:
        self.__dict__["global_step"] = value

    @property
    def epoch(self) -> float:
        """Epochs made so far."""
        moment = getattr(_of_this_thread, "moment", None)
        return self.__dict__["epoch"] if moment is None else moment[1]

    @epoch.setter
    def epoch(self, value: float) -> None:
        self.__dict__["epoch"] = value


class MomentContext(LossContext):
    """What the loss of a micro-batch needs, the step and epoch that it belongs to, and the context variables of its thread."""

    moment: tuple[int, float]
    variables: contextvars.Context


class LossAtItsStep(TrainerLoss[MomentContext]):
    """The loss as Trainer computes it, while its state says what it said when the micro-batch was submitted."""

    def __call__(self, model: ModelCall, inputs: dict[str, Any], context: MomentContext) -> torch.Tensor:
        """See `LossOfModel`."""
        with _at(context.moment):
            return context.variables.run(super().__call__, model, inputs, context)


@contextmanager
def _at(moment: tuple[int, float]) -> Iterator[None]:
    _of_this_thread.moment = moment
    try:
        yield
    finally:
        _of_this_thread.moment = None
