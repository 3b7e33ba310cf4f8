"""SharedAccounts: losses and norms of all processes, which come back some updates later, at points that don't depend on timing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import torch

from ..engine.accounts import Accounts, AwaitStep
from ..engine.settings import FinishedLoss, FinishedNorm, updates_behind
from ..partition import StagePlan
from .grid import ProcessGrid
from .reports import Reports, fingerprint


@dataclass
class OpenUpdate:
    """An update as it was submitted, until it is reported on.

    Args:
        ticks: its micro-batches.
        checksum: fingerprint of what they contain.
    """

    ticks: list[int] = field(default_factory=list)
    checksum: int = 0


class SharedAccounts(Accounts):
    """See `Accounts`; the same in all processes, which make the same calls in the same order.

    Args:
        grid: the processes.
        plan: which stage is where.
        micro_batches: M.
        check: raises if another process is known to have failed; called while this one waits.
    """

    reporting_delay = 1

    def __init__(self, grid: ProcessGrid, plan: StagePlan, micro_batches: int, check: Callable[[], None]):
        super().__init__(plan.placement.count(grid.device_index))
        self._reports = Reports(grid, plan.placement, check)
        self._behind = updates_behind(plan.num_stages, micro_batches)
        self._has_losses = plan.placement[-1] == grid.device_index
        self._closed = 0  # updates
        self._submitted = OpenUpdate()
        self._unreported: dict[int, OpenUpdate] = {}
        self._own_losses: dict[int, SupportsFloat] = {}
        self._own_norms: dict[int, dict[int, SupportsFloat | None]] = {}
        self._told: set[int] = set()  # micro-batches whose losses were told before their update was closed
        self._all_reported = self._stop_heard = False

    # ---- what the engine does ----

    def open_tick(self, tick: int, batch: Mapping[str, Any]) -> None:
        """See `Accounts`; the same micro-batch in all processes of the replica."""
        self._submitted.ticks.append(tick)
        self._submitted.checksum = fingerprint(batch, self._submitted.checksum)

    def close_update(self, update: int, await_step: AwaitStep) -> None:
        """See `Accounts`; reports on an update that was closed some updates ago."""
        self._unreported[update], self._submitted = self._submitted, OpenUpdate()
        self._closed = update + 1
        self._all_reported = False
        self._report(update - self._behind, await_step)

    def account_for(self, updates: int, await_step: AwaitStep) -> None:
        """See `Accounts`; all processes have reported on them then."""
        for update in sorted(u for u in self._unreported if u < updates):
            self._report(update, await_step)
        self._take_reports(all_before=updates)

    def account_for_open(self, await_step: AwaitStep) -> None:
        """See `Accounts`; all processes hear of the losses."""
        self.account_for(self._closed, await_step)
        ticks = [tick for tick in self._submitted.ticks if tick not in self._told]
        own = [float(self._own_losses[tick]) for tick in ticks] if self._has_losses else [0.0] * len(ticks)
        losses = self._reports.share(own)
        self._told |= set(ticks)
        self._losses += [FinishedLoss(t, torch.tensor(x)) for t, x in zip(ticks, losses, strict=True)]

    def report_all(self, await_step: AwaitStep) -> None:
        """See `Accounts`."""
        for update in sorted(self._unreported):
            self._report(update, await_step)
        self._all_reported = True

    def close(self, drained: bool) -> None:
        """See `Accounts`."""
        self._reports.close(drained)

    # ---- what workers report ----

    def add_loss(self, loss: FinishedLoss) -> None:
        """See `Accounts`."""
        self._own_losses[loss.tick] = loss.loss

    def add_step(self, stage: int, update: int, norm: SupportsFloat | None) -> None:
        """See `Accounts`."""
        self._own_norms.setdefault(update, {})[stage] = norm

    # ---- what is known ----

    def take_losses(self) -> list[FinishedLoss]:
        """See `Accounts`; means over replicas, of the updates reported on before the newest one."""
        self._take_reports()
        return super().take_losses()

    def take_norms(self) -> list[FinishedNorm]:
        """See `Accounts`; of the updates reported on before the newest one."""
        self._take_reports()
        return super().take_norms()

    def newest_norm(self) -> FinishedNorm | None:
        """See `Accounts`; of the newest update that was reported on."""
        self._take_reports()
        return super().newest_norm()

    def stop_requested(self) -> bool:
        """See `Accounts`; becomes true at the same step in all processes, to which the next reports tell it."""
        self._take_reports()
        return self._stop_heard

    # ---- inside ----

    def _report(self, update: int, await_step: AwaitStep) -> None:
        if update not in self._unreported:
            return
        submitted = self._unreported.pop(update)
        while len(self._own_norms.get(update, ())) < self._stages:
            await_step(update)
        norms = {k: None if norm is None else float(norm) for k, norm in self._own_norms.pop(update).items()}
        # The last stage's forwards of the update come before its step.
        losses = [float(self._own_losses.pop(tick)) for tick in submitted.ticks] if self._has_losses else []
        self._reports.send(self._closed, update, submitted.ticks, submitted.checksum, losses, norms, self._stop_asked)

    def _take_reports(self, all_before: int = 0) -> None:
        for report in self._reports.take(math.inf if self._all_reported else self._closed, all_before):
            self._stop_heard |= report.stop
            self._losses += [
                FinishedLoss(tick, torch.tensor(loss))
                for tick, loss in zip(report.ticks, report.losses, strict=True)
                if tick not in self._told
            ]
            self._told -= set(report.ticks)
            self._add_norm(FinishedNorm(report.update, tuple(n for n in report.norms if n is not None)))
