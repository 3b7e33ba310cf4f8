"""Compensation: the places where a stage's update may be changed because its gradients are late.

What a compensation has to remember lies in the optimizer's state of each parameter: it is saved, resumed, split over
processes and merged again as moments are. A compensation itself never changes during a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..options import Checked

GIVEN_BY = "delay_compensation_args"


@dataclass(frozen=True)
class StageUpdate:
    """An update as one stage sees it.

    Args:
        delay: tau_k = d_k/M = (K-1-k)/M, how many updates late the stage's gradients are applied, M being
            `gradient_accumulation_steps` (also where the end of an epoch leaves fewer); 0 in a synchronous update.
        delayed_before: updates since the delays started.
    """

    delay: float
    delayed_before: int


class Compensation(Checked):
    """Changes nothing; subclasses override what they change. All calls are without gradient recording."""

    given_by = GIVEN_BY
    name: str
    predicts: bool = False

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises UnsupportedOptionError where it has no meaning with this optimizer."""

    def learning_rate_factor(self, group: Mapping[str, Any], update: StageUpdate) -> float:
        """What the learning rate of a parameter group in a stage's update is multiplied by."""
        return 1.0

    def predict(
        self, parameter: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any], update: StageUpdate
    ) -> torch.Tensor | None:
        """Weights to be used by the forwards of an update, in storage of their own; None for the real ones.

        Asked only if `predicts`.

        Args:
            parameter: the real weights.
            state: the optimizer's state of it, empty before its first step.
            group: hyper-parameters of its group when the update opened, the learning rate being that of this stage.
            update: the update whose forwards they are for.
        """
        return None

    def correct(
        self, parameter: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any], update: StageUpdate
    ) -> torch.Tensor:
        """The gradient that the optimizer is to be given instead of the (clipped) one of the window."""
        return gradient

    def keeps_weights(self, update: StageUpdate) -> bool:
        """Whether `record` needs a copy of the weights before the step of an update."""
        return False

    def record(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        before: torch.Tensor | None,
        state: dict[str, Any],
        update: StageUpdate,
    ) -> None:
        """Remembers after a step what later ones need.

        Args:
            parameter: the new weights.
            gradient: what `correct` was given.
            before: a copy of the weights before the step, if `keeps_weights` asks for it.
            state: the optimizer's state of the parameter, to be written to.
            update: the update that was closed.
        """


def newest_first(state: Mapping[str, Any], key: str, value: torch.Tensor, length: int) -> torch.Tensor:
    """The history under a key, [up to `length`, *shape], with a new value in front."""
    history = state.get(key)
    return value[None].clone() if history is None or length == 1 else torch.cat([value[None], history[: length - 1]])
