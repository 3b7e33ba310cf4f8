"""error_feedback: what a late gradient got wrong is put right when the gradient that was missing arrives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..options import Number, option
from .compensation import Compensation, StageUpdate, newest_first

HISTORY = "feedback_history"


@dataclass(frozen=True)
class ErrorFeedback(Compensation):
    """The optimizer gets G[u] + feedback (tau_k/D) (G[u] - G[u-D]), with D = ceil(tau_k) and G[u] the gradient of update u.

    Derivation, for M = 1 (tau_k = D). G[u] was taken at the weights of update u-D. The optimizer had G[u-D] instead in that
    update, which was all that was known; that update's error becomes known only now: e = G[u] - G[u-D]. Adding it to what is
    applied now makes the sum of all that was applied by update u

        sum_{i<=u} (2 G[i] - G[i-D])  =  sum_{i<=u} G[i]  +  (the last D of the G's)

    which has as many terms as a run without delay would have applied: the D gradients that are still under way are stood in
    for by the last D known ones, for ever, rather than left out. With M > 1, tau_k of them are under way, hence tau_k/D. The
    noise of single gradients grows (2 G - G') but cancels in the optimizer's momentum, so high momentum helps.

    "Error feedback" is what work of 2026 on one-step delays calls a correction of this cost (a buffer of the size of the
    weights for D = 1); the definition here is this project's own. Applied after clipping.

    Together with weight_prediction the delay is compensated twice: gradients lead by tau_k updates more than they are late,
    which damps the oscillations that a delay drives. With whole updates of delay (M = 1) this is better than either alone.

    Costs D copies of a stage's gradients in the optimizer's state. No correction until D of them are known.

    Args:
        feedback: share of the error that is put right.
    """

    name = "error_feedback"
    feedback: float = option(1.0, Number(0.0))

    def correct(
        self, parameter: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any], update: StageUpdate
    ) -> torch.Tensor:
        """See the class."""
        back = math.ceil(update.delay)
        if back == 0 or HISTORY not in state or state[HISTORY].size(0) < back:
            return gradient
        error: torch.Tensor = gradient - state[HISTORY][back - 1]
        return error.mul_(self.feedback * update.delay / back).add_(gradient)

    def record(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        before: torch.Tensor | None,
        state: dict[str, Any],
        update: StageUpdate,
    ) -> None:
        """Keeps the gradient as it was before the correction."""
        if update.delay == 0:
            state.pop(HISTORY, None)
        else:
            state[HISTORY] = newest_first(state, HISTORY, gradient, math.ceil(update.delay))
