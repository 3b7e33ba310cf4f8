"""AtOnce: an engine that has done everything when a call returns, so that there is never anything to wait for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import EngineError
from ..partition import Partition
from .noise import StageNoise
from .randomness import has_dropout
from .reads import ReadCheck
from .settings import EngineSettings, FinishedLoss, FinishedNorm
from .state import RunState, starts_of
from .streams import Memories, Streams, memories_on

Gradients = dict[str, torch.Tensor]


class AtOnce:
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
    partition: Partition
    optimizer: torch.optim.Optimizer
    settings: EngineSettings
    _device: torch.device
    _seed: int
    _tick: int
    _update: int
    _first_tick: int
    _delay_start: int | None
    _queues: list[dict[int, Gradients]]
    _streams: Streams
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

    def state_dict(self) -> RunState:
        """What a run is besides weights and optimizer state.

        Raises:
            EngineError: an update is open (micro-batches submitted since the last step).
        """
        if self.update_open:
            raise EngineError("the state of a run is defined between updates; call step() first")
        return RunState(
            len(self._queues),
            self.settings.tied_gradient,
            self._seed,
            self._tick,
            self._update,
            self._delay_start,
            {k: self._pending(k) for k in range(len(self._queues))},
            dict(self._streams.positions),
            {k: dict(memories.groups) for k, memories in enumerate(self._memories)},
            self.settings.weights,
            starts_of(self.partition),
        )

    def load_state_dict(self, state: RunState) -> None:
        """Continues a run.

        Raises:
            CheckpointMismatchError: the state does not fit this run.
        """
        state.check(self.partition, self.settings)
        self._seed, self._delay_start = state.seed, state.delay_start
        self._tick, self._update, self._first_tick = state.tick, state.update, state.tick
        for k in range(len(self._queues)):
            self._take_pending(k, state.pending.get(k, {}))
        self._streams.positions = dict(state.streams)
        for k, memories in enumerate(self._memories):
            memories.groups = memories_on(self._device, state.memories.get(k, {}))

    def _pending(self, k: int) -> dict[int, Gradients]:
        """Copies of what is still to be applied to a stage, by tick."""
        return {t: {n: g.clone() for n, g in gradients.items()} for t, gradients in self._queues[k].items()}

    def _take_pending(self, k: int, pending: Mapping[int, Gradients]) -> None:
        """Inverse of `_pending`."""
        self._queues[k] = {
            t: {n: g.to(self._device, copy=True) for n, g in found.items()} for t, found in pending.items()
        }
