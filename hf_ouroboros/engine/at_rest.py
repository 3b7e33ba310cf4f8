"""AtRest: what others may do with an engine's weights, gradients and state while its workers rest."""

from __future__ import annotations

import torch

from ..errors import EngineError
from ..partition import Boundary, Partition
from ..schedules.clock import Clock, Slot
from .accounts import Accounts
from .exposed import ExposedUpdate
from .in_flight import whole
from .optimizers import StageOptimizer
from .parts import EngineParts
from .settings import EngineSettings
from .stage_runner import StageRunner
from .state import RunState, starts_of
from .streams import Streams, memories_on


class AtRest:
    """The part of an engine that works in the main thread, on the stages of this process."""

    partition: Partition
    settings: EngineSettings
    optimizer: torch.optim.Optimizer
    _parts: EngineParts
    _runners: dict[int, StageRunner]
    _accounts: Accounts
    _clock: Clock
    _streams: Streams
    _started: int
    _resting: bool
    _exposed: ExposedUpdate | None

    @property
    def update_open(self) -> bool:
        """Whether micro-batches were submitted since the last `step`."""
        raise NotImplementedError

    def rest(self) -> None:
        """Waits until all stages of this process have finished the newest tick; pending backwards stay pending."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """As `rest`, for all processes."""
        raise NotImplementedError

    def settle(self) -> None:
        """As `synchronize`, and runs the pending backwards."""
        raise NotImplementedError

    def _check(self) -> None:
        raise NotImplementedError

    def _release(self, slots: list[Slot]) -> None:
        raise NotImplementedError

    def _expect_gradient(self, stage: int, tick: int, output: Boundary) -> None:
        raise NotImplementedError

    def open_weights(self) -> None:
        """Rests; until `take_weights`, weights may be looked at, written and frozen. What is in flight keeps the old ones."""
        self.rest()
        for runner in self._runners.values():
            runner.let_go()

    def take_weights(self) -> None:
        """Takes weights as they are now, frozen or not, for all micro-batches from the next one on."""
        self.attach(self.optimizer)
        for runner in self._runners.values():
            runner.look_again()

    @property
    def has_views(self) -> bool:
        """Whether a script has views of weights."""
        return any(runner.has_views for runner in self._runners.values())

    @property
    def holds_gradients(self) -> bool:
        """Whether an update is open whose gradients are not in `grad` of the parameters."""
        return self.update_open and self._exposed is None

    def expose_gradients(self) -> None:
        """Puts the gradients that the open update will apply, clipped, where scripts look: into `grad` of the parameters.

        There they may be changed until `step`, which then steps all stages at once, and stay until `clear_gradients`.
        """
        if self._exposed is None:
            self._check()
            self._release(self._clock.drain())
            self._resting = False
            self.rest()
            share = self._parts.transport.share_at_rest
            self._exposed = ExposedUpdate(self._runners, self.settings, self.partition.plan.num_stages, share)

    def clear_gradients(self) -> None:
        """Removes the gradients that were exposed."""
        if self._exposed is not None:
            self._exposed.clear()
            self._exposed = None

    def state_dict(self) -> RunState:
        """Settles and returns what a run is besides weights and optimizer state.

        Raises:
            EngineError: an update is open (micro-batches submitted since the last step).
        """
        if self.update_open:
            raise EngineError("the state of a run is defined between updates; call step() first")
        self.settle()
        return RunState(
            self.partition.plan.num_stages,
            self.settings.tied_gradient,
            next(iter(self._runners.values())).seed,
            self._clock.tick,
            self._clock.update,
            self._clock.delay_start,
            # Copies: the run goes on and adds up and clips its gradients in place.
            {runner.index: runner.pending() for runner in self._runners.values()},
            dict(self._streams.positions),
            {runner.index: dict(runner.memories.groups) for runner in self._runners.values()},
            self.settings.weights,
            starts_of(self.partition),
        )

    def load_state_dict(self, state: RunState) -> None:
        """Continues a run; only before the first micro-batch.

        Raises:
            CheckpointError: the state does not fit this run.
        """
        if self._clock.tick:
            raise EngineError("load_state_dict() after the first micro-batch")
        state.check(self.partition, self.settings, self._runners)
        self.synchronize()
        for runner in self._runners.values():
            runner.take_pending(state.pending.get(runner.index, {}))
            for tick in sorted(runner.in_flight.keys() - runner.arrived.keys()):
                self._expect_gradient(runner.index, tick, whole(runner.in_flight[tick].shapes))
            runner.memories.groups = memories_on(runner.device, state.memories.get(runner.index, {}))
            runner.seed = state.seed
        self._streams.positions = dict(state.streams)
        self._clock.resume(state.tick, state.update, state.delay_start)
        self._accounts.complete = state.update
        self._started = state.tick - 1

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Cuts the stages' optimizers out of `optimizer`; again whenever its state was replaced."""
        self.optimizer = optimizer
        for runner in self._runners.values():
            owned = self.partition.owned(runner.index).values()
            runner.optimizer = StageOptimizer(optimizer, owned, self.settings.compensations)
