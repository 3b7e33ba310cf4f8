"""Accounts: losses and gradient norms that workers have reported, in the order of ticks and updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsFloat

from .settings import FinishedLoss, FinishedNorm


class Accounts:
    """What is known of ticks and updates, kept until somebody takes it.

    Args:
        stages: how many stages report the steps of an update.
    """

    def __init__(self, stages: int):
        self._stages = stages
        self._losses: list[FinishedLoss] = []
        self._open: dict[int, dict[int, SupportsFloat | None]] = {}
        self._norms: list[FinishedNorm] = []
        self.newest: FinishedNorm | None = None
        self.complete = 0
        """Updates that all stages have closed, those before the run was resumed included."""

    def add_losses(self, losses: Sequence[FinishedLoss]) -> None:
        """Losses have come, in tick order."""
        self._losses += losses

    def add_step(self, stage: int, update: int, norm: SupportsFloat | None) -> None:
        """A stage has closed an update; `norm` of its gradients before clipping, None if it had none."""
        norms = self._open.setdefault(update, {})
        norms[stage] = norm
        if len(norms) == self._stages:
            del self._open[update]
            # In stage order, not in that of arrival: the sum's last bit depends on it.
            self.add_norm(FinishedNorm(update, tuple(n for _, n in sorted(norms.items()) if n is not None)))

    def add_norm(self, norm: FinishedNorm) -> None:
        """All stages have closed an update."""
        self._norms.append(norm)
        self.newest, self.complete = norm, norm.update + 1

    def take_losses(self) -> list[FinishedLoss]:
        """The losses since the last call."""
        taken, self._losses = self._losses, []
        return taken

    def take_norms(self) -> list[FinishedNorm]:
        """The norms since the last call."""
        taken, self._norms = self._norms, []
        return taken
