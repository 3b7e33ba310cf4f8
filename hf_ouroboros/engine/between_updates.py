"""BetweenUpdates: the state of a run, which engine and reference give and take alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import torch

from ..errors import EngineError
from ..partition import Partition
from .loss_scale import LossScale
from .settings import EngineSettings
from .state import RunState, starts_of
from .streams import Memories, Streams, memories_on

Gradients = dict[str, torch.Tensor]


class BetweenUpdates(ABC):
    """The part of an engine, and of the reference, that knows what its run is between updates, besides weights and optimizer.

    Attributes:
        loss_scale: of losses in float16; None without scaling.
        step_was_skipped: whether the newest update of a synchronous schedule has made no step, as gradients have overflowed.
    """

    partition: Partition
    settings: EngineSettings
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None = None
    step_was_skipped: bool = False
    _streams: Streams
    _has_ended = False

    @property
    @abstractmethod
    def update_open(self) -> bool:
        """Whether micro-batches were submitted since the last `step`."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Updates closed so far, those before the run was resumed included."""

    @abstractmethod
    def account_for(self, updates: int) -> None:
        """Waits until losses and norms of so many updates can be collected."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all stages have finished the newest tick."""

    @abstractmethod
    def settle(self) -> None:
        """As `synchronize`, and runs the pending backwards as far as they need no weights that are still to come."""

    def finish(self) -> None:
        """As `settle`, where the run ends: what would be applied by further updates is not kept."""
        self._has_ended = True
        self.settle()

    def state_dict(self) -> RunState:
        """Settles and returns what the run is besides weights and optimizer state.

        Raises:
            EngineError: an update is open (micro-batches submitted since the last step), or the run has been finished.
        """
        if self._has_ended:
            raise EngineError(
                "training has ended, and gradients that no update applies were let go, so that a checkpoint could not be resumed; "
                "save it before on_train_end (save_strategy, or control.should_save in on_step_end)"
            )
        if self.update_open:
            raise EngineError("the state of a run is defined between updates; call step() first")
        self.settle()
        scale = None
        if self.loss_scale is not None:
            self.account_for(self.updates)
            scale = self.loss_scale.state()
        return RunState(
            self.partition.plan.num_stages,
            self.settings.tied_gradient,
            *self._clocks(),
            {k: self._pending(k) for k in self._own_stages()},
            dict(self._streams.positions),
            {k: dict(self._memories_of(k).groups) for k in self._own_stages()},
            self.settings.weights,
            starts_of(self.partition),
            scale,
        )

    def load_state_dict(self, state: RunState) -> None:
        """Continues a run; only before the first micro-batch.

        Raises:
            CheckpointError: the state does not fit this run.
        """
        state.check(self.partition, self.settings, self._own_stages())
        self.synchronize()
        for k in self._own_stages():
            self._take_pending(k, state.pending.get(k, {}))
            self._memories_of(k).groups = memories_on(self._device_of(k), state.memories.get(k, {}))
        self._streams.positions = dict(state.streams)
        if self.loss_scale is not None:
            self.loss_scale.resume(state.update, state.loss_scale)
        self._set_clocks(state.seed, state.tick, state.update, state.delay_start)

    # ---- what differs ----

    @abstractmethod
    def _own_stages(self) -> Collection[int]:
        """The stages of this process."""

    @abstractmethod
    def _clocks(self) -> tuple[int, int, int, int | None]:
        """Seed, ticks and updates so far, and the first delayed tick."""

    @abstractmethod
    def _set_clocks(self, seed: int, tick: int, update: int, delay_start: int | None) -> None:
        """Inverse of `_clocks`."""

    @abstractmethod
    def _pending(self, k: int) -> dict[int, Gradients]:
        """Copies of what is still to be applied to a stage, by tick: the run goes on and changes its gradients in place."""

    @abstractmethod
    def _take_pending(self, k: int, pending: Mapping[int, Gradients]) -> None:
        """Inverse of `_pending`."""

    @abstractmethod
    def _memories_of(self, k: int) -> Memories:
        """What a stage remembers of streams."""

    @abstractmethod
    def _device_of(self, k: int) -> torch.device:
        """Where a stage computes."""
