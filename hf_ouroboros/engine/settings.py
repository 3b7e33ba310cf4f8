"""What decides a run's numbers and memory, shared by the engine and the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch

from ..optim import Compensation, StageUpdate
from ..schedules import DEFAULT, SCHEDULES, Schedule
from .loss_scale import INTERVAL, LossScale

Hyperparameters = list[dict[str, Any]]
"""Per parameter group of the optimizer, everything but the parameters: learning rate, betas, ..."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings of one training run.

    Args:
        schedule: one of `SCHEDULES`.
        tied_gradient: "joint" delays both sides of a tied embedding by K-1 ticks, "paper" only the input side.
        max_grad_norm: bound of the gradient norm; None for no clipping.
        clip_scope: "stage" bounds each stage's norm by max_grad_norm/sqrt(K), "global" the whole model's.
        delay_warmup_steps: updates before the delays start.
        seed: seed of the dropout masks.
        autocast_dtype: dtype of mixed precision forwards; None for none.
        recompute: keep only the inputs of in-flight micro-batches and replay their forward at backward.
        threads: intra-op threads per CPU device; None leaves torch's setting.
        micro_batches: M, expected ticks per update: for the interleaving of stages, and for delays counted in updates.
        compensations: what is done about the delay besides the choice of the optimizer.
        weights: of a late backward: "then", those of its forward, or "now", the newest ones, for which it replays its forward.
        initial_loss_scale: with which losses are scaled at first, in float16 (`loss_scale.py`); None for no scaling.
        loss_scale_interval: updates without an overflow after which the scale is doubled.
    """

    schedule: str = DEFAULT
    tied_gradient: str = "joint"
    max_grad_norm: float | None = None
    clip_scope: str = "stage"
    delay_warmup_steps: int = 0
    seed: int = 0
    autocast_dtype: torch.dtype | None = None
    recompute: bool = False
    threads: int | None = None
    micro_batches: int = 1
    compensations: tuple[Compensation, ...] = ()
    weights: str = "then"
    initial_loss_scale: float | None = None
    loss_scale_interval: int = INTERVAL

    @property
    def record(self) -> Schedule:
        """What there is to know of the schedule."""
        return SCHEDULES[self.schedule]

    @property
    def predicts(self) -> bool:
        """Whether forwards use predicted weights."""
        return any(compensation.predicts for compensation in self.compensations)

    @property
    def replays_newest(self) -> bool:
        """Whether late backwards replay their forward with the newest weights, so that no older ones are kept."""
        return self.weights == "now" and not self.record.is_synchronous

    @property
    def replayed_by(self) -> str | None:
        """The option for which all stages but the last replay forwards; None where they don't."""
        return "weights='now'" if self.replays_newest else "recompute=True" if self.recompute else None

    @property
    def scales_losses(self) -> bool:
        """Whether losses are scaled, and gradients that have overflowed are dropped."""
        return self.initial_loss_scale is not None

    @property
    def drops_together(self) -> bool:
        """Whether gradients that overflow on one stage are dropped on all of them; else that stage alone makes no step."""
        return self.scales_losses and (self.record.is_synchronous or self.clip_scope == "global")

    @property
    def shares_norms(self) -> bool:
        """Whether all stages are told the gradient norms of all of them before they step."""
        return self.clip_scope == "global" or self.drops_together

    def loss_scale(self, num_stages: int) -> LossScale | None:
        """The scale of losses at the beginning of a run; None for none."""
        if self.initial_loss_scale is None:
            return None
        lag, span = 1, 0
        if not self.record.is_synchronous:
            # The report on an update is sent after so many updates, and has arrived one later.
            lag = updates_behind(num_stages, self.micro_batches) + 2
            span = math.ceil((num_stages - 1) / self.micro_batches)
        return LossScale(self.initial_loss_scale, self.loss_scale_interval, lag, span)

    def is_synchronous(self, update: int) -> bool:
        """Whether an update is drained, so that its gradients have no delay."""
        return self.record.is_synchronous or update < self.delay_warmup_steps

    def stage_update(self, stage: int, num_stages: int, update: int) -> StageUpdate:
        """An update as a stage sees it."""
        delay = 0.0 if self.is_synchronous(update) else (num_stages - 1 - stage) / self.micro_batches
        return StageUpdate(delay, max(0, update - self.delay_warmup_steps))

    def stage_norm_bound(self, num_stages: int) -> float:
        """Bound of one stage's gradient norm under clip_scope="stage"; infinite without clipping."""
        return math.inf if self.max_grad_norm is None else self.max_grad_norm / math.sqrt(num_stages)


@dataclass(frozen=True)
class FinishedLoss:
    """The loss of one micro-batch, reported once.

    Args:
        tick: the micro-batch.
        loss: a scalar, in the normalisation of its own update; `float` waits for it where it has to be.
    """

    tick: int
    loss: SupportsFloat


@dataclass(frozen=True)
class FinishedNorm:
    """The gradient norm of one update, before clipping, reported once all its stages have closed it.

    Args:
        update: its number.
        stages: norm of each stage that had gradients, in stage order.
        scale: that the losses of the update had; None without scaling.
    """

    update: int
    stages: tuple[SupportsFloat, ...]
    scale: float | None = None

    @property
    def value(self) -> float:
        """Norm of the gradients of the whole model."""
        return math.sqrt(sum(float(norm) ** 2 for norm in self.stages))

    @property
    def has_overflowed(self) -> bool:
        """Whether gradients of any stage were no finite numbers."""
        return not all(math.isfinite(float(norm)) for norm in self.stages)


def updates_behind(num_stages: int, micro_batches: int) -> int:
    """Updates after which the account of a delayed update is there without anybody having waited for it.

    An interleaved device stays behind by less than K slots, and a micro-batch is on its way for K; updates may be ragged,
    so this is no promise.
    """
    return math.ceil(2 * num_stages / micro_batches) + 1
