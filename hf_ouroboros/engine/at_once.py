"""AtOnce: an engine that has done everything when a call returns, so that there is never anything to wait for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from .between_updates import BetweenUpdates, Gradients
from .noise import StageNoise
from .randomness import has_dropout
from .reads import ReadCheck
from .settings import FinishedLoss, FinishedNorm
from .streams import Memories


class AtOnce(BetweenUpdates):
    """The part of the reference that is no algorithm: what it answers where `Engine` would wait, and the state of its run.

    Attributes:
        closed: whether `close` was called; never, as there is nothing to stop.
        stop_requested: whether the end of the run was asked for.
        has_views: whether a script has views of weights that would have to be kept apart; the parameters themselves are used.
        holds_gradients: whether gradients are kept from scripts; they never are.
    """

    closed = False
    stop_requested = False
    has_views = False
    holds_gradients = False
    _device: torch.device
    _seed: int
    _tick: int
    _update: int
    _first_tick: int
    _delay_start: int | None
    _queues: list[dict[int, Gradients]]
    _memories: list[Memories]
    _noise: list[StageNoise]
    _reads: list[ReadCheck]
    _finished: list[FinishedLoss]
    _norms: list[FinishedNorm]

    # ---- losses, norms and the end ----

    @property
    def updates(self) -> int:
        """Updates closed so far, those before the run was resumed included."""
        return self._update

    @property
    def update_open(self) -> bool:
        """Whether micro-batches were submitted since the last `step`."""
        return self._tick > self._first_tick

    def collect(self) -> list[FinishedLoss]:
        """Losses since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def collect_norms(self) -> list[FinishedNorm]:
        """Gradient norms since the last call."""
        finished, self._norms = self._norms, []
        return finished

    def updates_behind(self, update: int) -> int:
        """Nothing is late."""
        return 0

    def account_for(self, updates: int) -> None:
        """Everything is known at once."""

    def account_for_open(self) -> None:
        """Everything is known at once."""

    def request_stop(self) -> None:
        """Asks for the end of the run."""
        self.stop_requested = True

    def close(self) -> None:
        """Nothing to stop."""

    # ---- looking at the weights ----

    def rest(self) -> None:
        """Nothing is ever in flight."""

    def synchronize(self) -> None:
        """Nothing is ever in flight."""

    def settle(self) -> None:
        """Nothing is ever in flight."""

    def open_weights(self) -> None:
        """Between micro-batches, weights may be written and frozen by anybody."""

    def take_weights(self) -> None:
        """The parameters are always used as they are; what draws random numbers may have changed."""
        for noise, reads, stage in zip(self._noise, self._reads, self.partition.stages, strict=True):
            noise.look_again(stage.draws or has_dropout(stage))
            reads.look_again()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Uses this optimizer from now on."""
        self.optimizer = optimizer

    # ---- the state of the run ----

    def _own_stages(self) -> Collection[int]:
        return range(len(self._queues))

    def _clocks(self) -> tuple[int, int, int, int | None]:
        return self._seed, self._tick, self._update, self._delay_start

    def _set_clocks(self, seed: int, tick: int, update: int, delay_start: int | None) -> None:
        self._seed, self._tick, self._update, self._delay_start = seed, tick, update, delay_start
        self._first_tick = tick

    def _memories_of(self, k: int) -> Memories:
        return self._memories[k]

    def _device_of(self, k: int) -> torch.device:
        return self._device

    def _pending(self, k: int) -> dict[int, Gradients]:
        return {t: {n: g.clone() for n, g in gradients.items()} for t, gradients in self._queues[k].items()}

    def _take_pending(self, k: int, pending: Mapping[int, Gradients]) -> None:
        self._queues[k] = {
            t: {n: g.to(self._device, copy=True) for n, g in found.items()} for t, found in pending.items()
        }
