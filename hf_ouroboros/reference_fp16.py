"""The update rule in float16, on one device, in its simplest form: the oracle of every test of fp16=True.

Weights are float32, and forwards compute in float16 (autocast). In addition to `Reference`:

    tick t of update u    the loss is multiplied by S(u), and the gradients of all stages, before they are queued, by 1 / S(u)
    end of update u       stage k whose g_k[u] has an element that is no finite number drops it: no step, no decay, no count, as if its
                          window was empty. The others make their steps: theirs are gradients of the same batches, and right.
                          Where stages wait for each other anyway (a synchronous schedule, or a global norm), all drop theirs.
    S(u)                  is decided from what became of updates up to u - L, on all stages: `engine/loss_scale.py`

In a synchronous schedule that is torch.amp.GradScaler, which Trainer uses, and as there an update without a step does not count
for the scheduler of the learning rate, unless the optimizer is fused. With delays it counts: some stages have made their steps.

Whether gradients are finite is asked of their norm, which is computed anyway. S is a power of two, so that scaling and unscaling
change nothing but what overflows, or would have been lost, in float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from .engine.between_updates import Gradients
from .engine.in_flight import scaled_one
from .engine.streams import Segment
from .reference import Reference


class ReferenceScaled(Reference):
    """As `Reference`, with scaled losses."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loss_scale = self.settings.loss_scale(len(self._owned))
        self._scale = 1.0

    def submit(self, batch: Mapping[str, Any], context: Any = None) -> int:
        """As in `Reference`."""
        if not self.update_open:
            assert self.loss_scale is not None
            self._scale = self.loss_scale.open(self._update)
        return super().submit(batch, context)

    def _compute(
        self, tick: int, batch: Mapping[str, Any], context: Any, segment: Segment | None, delayed: bool
    ) -> torch.Tensor:
        loss = super()._compute(tick, batch, context, segment, delayed)
        self._output_side[tick] = self._unscaled(self._output_side[tick])
        return loss

    def _one(self, loss: torch.Tensor) -> torch.Tensor | None:
        return scaled_one(loss, self._scale)

    def _taken(self, k: int, leaves: Mapping[int, torch.Tensor]) -> Gradients:
        return self._unscaled(super()._taken(k, leaves))

    def _unscaled(self, gradients: Gradients) -> Gradients:
        return {name: gradient * (1 / self._scale) for name, gradient in gradients.items()}

    def _clip(self) -> None:
        """As in `Reference`, but for gradients that have overflowed, which are dropped."""
        assert self.loss_scale is not None
        found = [[p.grad for p in owned.values() if p.grad is not None] for owned in self._owned]
        overflowed = [not math.isfinite(get_total_norm(gradients)) for gradients in found]
        super()._clip()
        for k, owned in enumerate(self._owned):
            if any(overflowed) if self.settings.drops_together else overflowed[k]:
                for parameter in owned.values():
                    parameter.grad = None
        scale = self.loss_scale.hear(self._update, any(overflowed))
        self._norms[-1] = replace(self._norms[-1], scale=scale)
        self.step_was_skipped = any(overflowed) and self.settings.record.is_synchronous
