"""AtRest: what others may do with an engine's weights, gradients and state while its workers rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping

import torch

from ..errors import EngineError
from ..partition import Boundary
from ..schedules.clock import Clock, Slot
from .accounts import Accounts
from .between_updates import BetweenUpdates, Gradients
from .exposed import ExposedUpdate
from .in_flight import whole
from .optimizers import StageOptimizer
from .parts import EngineParts
from .stage_runner import StageRunner
from .state import RunState
from .streams import Memories


class AtRest(BetweenUpdates):
    """The part of an engine that works in the main thread, on the stages of this process."""

    _parts: EngineParts
    _runners: dict[int, StageRunner]
    _accounts: Accounts
    _clock: Clock
    _started: int
    _resting: bool
    _exposed: ExposedUpdate | None

    @abstractmethod
    def rest(self) -> None:
        """Waits until all stages of this process have finished the newest tick; pending backwards stay pending."""

    @abstractmethod
    def _check(self) -> None:
        """Raises if a worker has failed, or the engine is closed."""

    @abstractmethod
    def _release(self, slots: list[Slot]) -> None:
        """Hands slots to the workers."""

    @abstractmethod
    def _expect_gradient(self, stage: int, tick: int, output: Boundary) -> None:
        """The gradient of a stage's output will be received."""

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

    def finish(self) -> None:
        """As `settle`, where the run ends: of the gradients, one micro-batch's at a time is there."""
        for runner in self._runners.values():
            runner.keeps_pending = False
        super().finish()
        for runner in self._runners.values():
            runner.settled.clear()

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

    def load_state_dict(self, state: RunState) -> None:
        """Continues a run; only before the first micro-batch.

        Raises:
            CheckpointError: the state does not fit this run.
        """
        if self._clock.tick:
            raise EngineError("load_state_dict() after the first micro-batch")
        super().load_state_dict(state)
        self._accounts.complete = state.update
        self._started = state.tick - 1

    def _own_stages(self) -> Collection[int]:
        return self._runners

    def _clocks(self) -> tuple[int, int, int, int | None]:
        seed, clock = next(iter(self._runners.values())).seed, self._clock
        return seed, clock.tick, clock.update, clock.delay_start

    def _set_clocks(self, seed: int, tick: int, update: int, delay_start: int | None) -> None:
        for runner in self._runners.values():
            runner.seed = seed
        self._clock.resume(tick, update, delay_start)

    def _pending(self, k: int) -> dict[int, Gradients]:
        return self._runners[k].pending()

    def _take_pending(self, k: int, pending: Mapping[int, Gradients]) -> None:
        runner = self._runners[k]
        runner.take_pending(pending)
        for tick in sorted(runner.in_flight.keys() - runner.arrived.keys()):
            self._expect_gradient(k, tick, whole(runner.in_flight[tick].shapes))

    def _memories_of(self, k: int) -> Memories:
        return self._runners[k].memories

    def _device_of(self, k: int) -> torch.device:
        return self._runners[k].device

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Cuts the stages' optimizers out of `optimizer`; again whenever its state was replaced."""
        self.optimizer = optimizer
        for runner in self._runners.values():
            owned = self.partition.owned(runner.index).values()
            runner.optimizer = StageOptimizer(optimizer, owned, self.settings.compensations)
