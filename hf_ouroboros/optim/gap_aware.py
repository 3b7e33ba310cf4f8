"""gap_aware: gradients shrink where the weights have moved far since they were taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..options import Number, option
from .compensation import Compensation, StageUpdate, newest_first

HISTORY = "gap_history"
SQUARE = "gap_step_square"


@dataclass(frozen=True)
class GapAware(Compensation):
    """g / (1 + |w[u] - w[u-D]| / (sqrt(E) + eps)), elementwise; E is a moving average of squared steps.

    Barkai, Hakimi, Schuster, "Gap-Aware Mitigation of Gradient Staleness" (ICLR 2020). The gap is measured once per update:
    D = ceil(tau_k) updates back, times tau_k/D where the delay is no whole number of updates (M > 1), to the sum of the
    update's window. With M = 1 this is the gap of the one gradient. Applied after clipping.

    Costs D + 1 copies of a stage's weights, in the optimizer's state (and in checkpoints): they must outlive a resume.

    Args:
        gap_decay: of the moving average E[u+1] = decay E[u] + (1 - decay) step^2, which starts with the first step^2.
        gap_eps: keeps the division finite.
    """

    name = "gap_aware"
    gap_decay: float = option(0.99, Number(0.0, 1.0, below=True))
    gap_eps: float = option(1e-8, Number(0.0, above=True))

    def correct(
        self, parameter: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any], update: StageUpdate
    ) -> torch.Tensor:
        """See the class; the oldest weights known stand in where the delays began less than D updates ago."""
        if update.delay == 0 or HISTORY not in state:
            return gradient
        back = math.ceil(update.delay)
        then: torch.Tensor = state[HISTORY][:back][-1]
        square: torch.Tensor = state[SQUARE]
        gap = (parameter.detach() - then).abs() * (update.delay / back)
        return gradient / (1 + gap / (square.sqrt() + self.gap_eps))

    def keeps_weights(self, update: StageUpdate) -> bool:
        """Always: the average of steps goes on in synchronous updates."""
        return True

    def record(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        before: torch.Tensor | None,
        state: dict[str, Any],
        update: StageUpdate,
    ) -> None:
        """Keeps the weights before the step, and the size of the step."""
        assert before is not None  # as `keeps_weights` asks for
        square = (parameter - before).square()
        state[SQUARE] = torch.lerp(square, state[SQUARE], self.gap_decay) if SQUARE in state else square
        if update.delay == 0:
            state.pop(HISTORY, None)
        else:
            state[HISTORY] = newest_first(state, HISTORY, before, math.ceil(update.delay))
