"""ProcessEngine: the engine of one device, in a process of its own, beside those of the other devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import torch

from ..engine.core import Engine, Site
from ..engine.losses import LossFunction
from ..engine.messages import StepDone
from ..engine.settings import EngineSettings, FinishedLoss, FinishedNorm, log_lag
from ..partition import Partition
from ..simulate.timeline import Timeline
from .grid import ProcessGrid
from .process_transport import ProcessTransport
from .replica_mean import GroupMean
from .reports import Reports, fingerprint
from .wires import BoundarySpec


class ProcessEngine(Engine):
    """As `Engine`, for the device of this process; all processes make the same calls in the same order.

    Losses and norms come back some updates later than in one process, at points that don't depend on timing, and the
    same in all processes.

    Args:
        grid: the processes.
        specs: what each stage but the last puts out.
        check: raises if another process is known to have failed; called while this one waits.
    """

    def __init__(
        self,
        partition: Partition,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        settings: EngineSettings,
        timeline: Timeline | None,
        grid: ProcessGrid,
        specs: Sequence[BoundarySpec],
        check: Callable[[], None] = lambda: None,
    ):
        plan = partition.plan
        self._grid = grid
        self._check_others = check
        self._waits: tuple[str | None, int | None] = None, None
        self._reports = Reports(grid, plan.placement, check)
        self._transport = ProcessTransport(grid, plan.placement, specs, self._wait_for)
        self._last_stage_here = plan.placement[-1] == grid.device_index
        self._open: tuple[list[int], int] = [], 0  # ticks of the open update, fingerprint of its micro-batches
        self._unreported: dict[int, tuple[list[int], int]] = {}
        self._losses: dict[int, SupportsFloat] = {}
        self._told: set[int] = set()  # micro-batches whose losses were told before their update was closed
        self._own_norms: dict[int, dict[int, SupportsFloat | None]] = {}
        self._all_reported = self._stop_asked = self._stop_heard = False
        self._column = grid.lease_group("column") if grid.replicas > 1 else None
        self._drained = True  # whether all processes have received all that was sent to them
        mean = None if self._column is None else GroupMean(self._column.group)
        # The other processes may be K-1 ticks behind or ahead, and this one's main thread waits for theirs now and then:
        # with K+1 micro-batches in stock the worker never runs dry meanwhile. They are token ids; activations are bounded
        # by the schedule.
        site = Site({grid.device_index: grid.device}, self._transport, plan.num_stages + 1, mean)
        self._lag = log_lag(plan.num_stages, settings.micro_batches)
        super().__init__(partition, optimizer, loss_fn, settings, timeline, site)

    def submit(self, batch: Mapping[str, Any], context: Any = None) -> int:
        """Hands over the next micro-batch, the same one in all processes of the replica."""
        self._drained = False
        tick = super().submit(batch, context)
        ticks, checksum = self._open
        self._open = [*ticks, tick], fingerprint(batch, checksum)
        return tick

    def step(self) -> int:
        """Closes the update, and reports on one that was closed some updates ago."""
        update = super().step()
        self._unreported[update], self._open = self._open, ([], 0)
        self._all_reported = False
        self._report(update - self._lag)
        return update

    def collect(self) -> list[FinishedLoss]:
        """Losses, means over replicas, of the updates reported on before the newest one."""
        self._take_reports()
        return super().collect()

    def collect_norms(self) -> list[FinishedNorm]:
        """Gradient norms of the updates reported on before the newest one."""
        self._take_reports()
        return super().collect_norms()

    @property
    def grad_norm(self) -> float | None:
        """Gradient norm, before clipping, of the newest update that was reported on."""
        self._take_reports()
        return super().grad_norm

    def lag(self, update: int) -> int:
        """As in `Engine`; reports are on their way for one update more."""
        lag = super().lag(update)
        return lag + 1 if lag else 0

    def account_for(self, updates: int) -> None:
        """Waits until all processes have reported on so many updates."""
        for update in sorted(u for u in self._unreported if u < updates):
            self._report(update)
        self._take_reports(all_before=updates)

    def account_for_open(self) -> None:
        """As in `Engine`; all processes hear of the losses."""
        self.account_for(self.updates)
        self.rest()
        self._hear(block=False)
        ticks = [tick for tick in self._open[0] if tick not in self._told]
        own = [float(self._losses[tick]) for tick in ticks] if self._last_stage_here else [0.0] * len(ticks)
        losses = self._reports.share(own)
        self._told |= set(ticks)
        self._accounts.add_losses([FinishedLoss(t, torch.tensor(x)) for t, x in zip(ticks, losses, strict=True)])

    def synchronize(self) -> None:
        """Waits until this process's stages have finished the newest tick, and reports on all updates closed so far."""
        super().synchronize()
        self._report_all()

    def settle(self) -> None:
        """Like `synchronize`, and runs the pending backwards."""
        super().settle()
        self._transport.flush()
        self._report_all()
        self._drained = not self.update_open

    def close(self, timeout: float = 2.0) -> None:
        """Stops this process's worker."""
        if not self.closed:
            drained = self._drained and self._failure is None
            super().close(timeout)
            self._transport.close(drained)
            self._reports.close(drained)
            if self._column is not None:
                self._column.end(drained)

    def request_stop(self) -> None:
        """Tells all processes, with the next reports, that this one asks for the end of the run."""
        self._stop_asked = True

    @property
    def stop_requested(self) -> bool:
        """Whether a process asked for the end of the run; becomes true at the same step in all of them."""
        self._take_reports()
        return self._stop_heard

    def doing(self) -> tuple[str, int | None]:
        """What this process's worker is doing, and the rank that it waits for, if it waits for one."""
        what, peer = self._waits
        if what is not None:
            return f"waiting for {what}", peer
        instruction = self._workers[0].instruction
        return ("waiting for its next micro-batch" if instruction is None else f"at {instruction}"), None

    # ---- inside ----

    def _wait_for(self, what: str | None, peer: int | None) -> None:
        self._waits = what, peer

    def _still_waiting(self) -> None:
        self._check_others()

    def _take(self, event: Any) -> None:
        match event:
            case FinishedLoss(tick, loss):
                self._losses[tick] = loss
            case StepDone(stage, update, norm):
                self._own_norms.setdefault(update, {})[stage] = norm
            case _:
                super()._take(event)

    def _take_reports(self, all_before: int = 0) -> None:
        for report in self._reports.take(math.inf if self._all_reported else self._clock.update, all_before):
            self._stop_heard |= report.stop
            self._accounts.add_losses(
                [
                    FinishedLoss(tick, torch.tensor(loss))
                    for tick, loss in zip(report.ticks, report.losses, strict=True)
                    if tick not in self._told
                ]
            )
            self._told -= set(report.ticks)
            self._accounts.add_norm(FinishedNorm(report.update, tuple(n for n in report.norms if n is not None)))

    def _report_all(self) -> None:
        for update in sorted(self._unreported):
            self._report(update)
        self._all_reported = True

    def _report(self, update: int) -> None:
        if update not in self._unreported:
            return
        ticks, checksum = self._unreported.pop(update)
        while len(self._own_norms.get(update, ())) < len(self._runners):
            self._await_step(update)
        norms = {k: None if norm is None else float(norm) for k, norm in self._own_norms.pop(update).items()}
        # The last stage's forwards of the update come before its step.
        losses = [float(self._losses.pop(tick)) for tick in ticks] if self._last_stage_here else []
        self._reports.send(self._clock.update, update, ticks, checksum, losses, norms, self._stop_asked)

    def _share_norms(self, update: int, norms: dict[int, torch.Tensor | None]) -> dict[int, torch.Tensor | None]:
        return self._transport.share(self._clock.update, norms)
