"""Accounts: losses and gradient norms of a run, in the order of ticks and updates, and who asked for its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, SupportsFloat

from .loss_scale import LossScale
from .settings import FinishedLoss, FinishedNorm

AwaitStep = Callable[[int], None]
"""Waits for a report that brings the end of an update nearer."""


class Accounts:
    """What is known of ticks and updates, kept until somebody takes it: all of it comes from the workers of this process.

    Where other processes have other stages, `processes.shared_accounts` tells each what the others know.

    Args:
        stages: how many stages of this process report the steps of an update.
    """

    reporting_delay = 0
    """Updates for which a report is on its way after the workers have made it."""

    def __init__(self, stages: int):
        self._stages = stages
        self._losses: list[FinishedLoss] = []
        self._open: dict[int, dict[int, SupportsFloat | None]] = {}
        self._norms: list[FinishedNorm] = []
        self._newest: FinishedNorm | None = None
        self._stop_asked = False
        self.complete = 0
        """Updates that all stages have closed, those before the run was resumed included."""
        self.loss_scale: LossScale | None = None
        """What is told of every update whether its gradients have overflowed; None where nobody wants to know."""

    # ---- what the engine does ----

    def open_tick(self, tick: int, batch: Mapping[str, Any]) -> None:
        """A micro-batch was submitted."""

    def close_update(self, update: int, await_step: AwaitStep) -> None:
        """The update was closed."""

    def account_for(self, updates: int, await_step: AwaitStep) -> None:
        """Waits until losses and norms of so many updates can be taken."""
        while self.complete < updates:
            await_step(updates - 1)

    def account_for_open(self, await_step: AwaitStep) -> None:
        """Waits until the losses of the open update can be taken; the stages of this process have finished all of it."""

    def report_all(self, await_step: AwaitStep) -> None:
        """The stages of this process have finished everything, so all updates that were closed can be reported on."""

    def close(self, drained: bool) -> None:
        """The end; see `Transport.close`."""

    # ---- what workers report ----

    def add_loss(self, loss: FinishedLoss) -> None:
        """A loss has come, in tick order."""
        self._losses.append(loss)

    def add_step(self, stage: int, update: int, norm: SupportsFloat | None) -> None:
        """A stage has closed an update; `norm` of its gradients before clipping, None if it had none."""
        norms = self._open.setdefault(update, {})
        norms[stage] = norm
        if len(norms) == self._stages:
            del self._open[update]
            # In stage order, not in that of arrival: the sum's last bit depends on it.
            self._add_norm(FinishedNorm(update, tuple(n for _, n in sorted(norms.items()) if n is not None)))

    def _add_norm(self, norm: FinishedNorm) -> None:
        if self.loss_scale is not None:
            norm = replace(norm, scale=self.loss_scale.hear(norm.update, norm.has_overflowed))
        self._norms.append(norm)
        self._newest, self.complete = norm, norm.update + 1

    # ---- what is known ----

    def take_losses(self) -> list[FinishedLoss]:
        """The losses since the last call."""
        taken, self._losses = self._losses, []
        return taken

    def take_norms(self) -> list[FinishedNorm]:
        """The norms since the last call."""
        taken, self._norms = self._norms, []
        return taken

    def newest_norm(self) -> FinishedNorm | None:
        """That of the newest update that all stages have closed."""
        return self._newest

    def request_stop(self) -> None:
        """Asks for the end of the run."""
        self._stop_asked = True

    def stop_requested(self) -> bool:
        """Whether the end of the run was asked for, by anybody."""
        return self._stop_asked
