"""What the trainer's hooks ask of the engine, and of each other.

The hooks are parts of one class, `OuroborosTrainer`, each with a concern of its own. What one of them has and another one uses
is declared here, for the type checker: nothing is made here at run time but two properties that say when something is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import Trainer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ..arguments import OuroborosArguments
    from ..engine.settings import EngineSettings, FinishedLoss, FinishedNorm
    from ..engine.state import RunState
    from ..ledger import LossLedger
    from ..optim import Choice
    from ..partition import Partition, StagePlan
    from ..processes.processes import Processes
    from ..simulate.timeline import Timeline
    from ..staged import StagedModel, StagedOptimizer
    from .script import Script


class RunningEngine(Protocol):
    """An engine as trainer, hooks and faces see it; see `engine.core.Engine` and `Reference`."""

    @property
    def settings(self) -> EngineSettings:
        """What decides the run's numbers."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""

    @property
    def updates(self) -> int:
        """Updates closed so far, those before the run was resumed included."""

    @property
    def update_open(self) -> bool:
        """Whether micro-batches were submitted since the last `step`."""

    # ---- training ----

    def submit(self, batch: Mapping[str, Any], context: Any = None) -> int:
        """Hands over the next micro-batch; returns its tick."""

    def step(self) -> int:
        """Closes the update after the newest micro-batch; returns its number."""

    @property
    def step_was_skipped(self) -> bool:
        """Whether the newest update of a synchronous schedule has made no step, as gradients have overflowed."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Uses this optimizer from now on; again whenever its state was replaced."""

    def close(self) -> None:
        """Stops whatever runs."""

    # ---- losses and norms ----

    def collect(self) -> list[FinishedLoss]:
        """Losses finished since the last call, in tick order."""

    def collect_norms(self) -> list[FinishedNorm]:
        """Gradient norms known since the last call, in the order of updates."""

    def updates_behind(self, update: int) -> int:
        """After how many more updates those of this one can be waited for without the pipeline running dry."""

    def account_for(self, updates: int) -> None:
        """Waits until those of so many updates can be collected."""

    def account_for_open(self) -> None:
        """Waits until the losses of the open update's micro-batches can be collected."""

    # ---- the end of the run ----

    @property
    def stop_requested(self) -> bool:
        """Whether the end of the run was asked for."""

    def request_stop(self) -> None:
        """Asks for it."""

    # ---- looking at the weights ----

    @property
    def has_views(self) -> bool:
        """Whether a script has views of weights."""

    @property
    def holds_gradients(self) -> bool:
        """Whether an update is open whose gradients are not in `grad` of the parameters."""

    def rest(self) -> None:
        """Waits until the stages of this process have finished the newest tick."""

    def synchronize(self) -> None:
        """As `rest`, for all processes."""

    def finish(self) -> None:
        """As `synchronize`, and runs the pending backwards, where the run ends."""

    def open_weights(self) -> None:
        """Rests; until `take_weights`, weights may be looked at, written and frozen."""

    def take_weights(self) -> None:
        """Takes weights as they are now, from the next micro-batch on."""

    def expose_gradients(self) -> None:
        """Puts the gradients that the open update will apply into `grad` of the parameters."""

    def clear_gradients(self) -> None:
        """Removes them."""

    # ---- the state of the run ----

    def state_dict(self) -> RunState:
        """What the run is besides weights and optimizer state."""

    def load_state_dict(self, state: RunState) -> None:
        """Continues a run; only before the first micro-batch."""


class SplitTrainer(Trainer):
    """Trainer with what its hooks share.

    Attributes:
        model: a Transformers model, or what PEFT has put around one, which passes its attributes on.
        engine: of the present or last `train()`; None before.
        timeline: what the workers of the last `train()` have executed; None without `timeline=...`.
        _partition: the stages; with it, the model as one of all stages.
        _processes: of the run; one or several.
        _script: what was found of the script's code when the last `train()` began.
    """

    model: PreTrainedModel
    engine: RunningEngine | None
    timeline: Timeline | None
    _partition: Partition
    _staged: StagedModel
    _processes: Processes
    _ledger: LossLedger
    _script: Script

    if TYPE_CHECKING:

        @property
        def options(self) -> OuroborosArguments: ...  # AgreementHooks

        @property
        def stage_plan(self) -> StagePlan: ...  # OuroborosTrainer

        @property
        def delay_compensation(self) -> Choice: ...  # OptimizerHooks

        @property
        def _pipeline_runs(self) -> bool: ...  # CallbackHooks

        @property
        def _face(self) -> StagedOptimizer: ...  # OptimizerHooks

        def synchronize(self) -> None: ...  # OuroborosTrainer

        def _split(self, model: nn.Module, args: OuroborosArguments) -> None: ...  # OuroborosTrainer

        def _split_if_changed(self) -> None: ...  # ChangeHooks

        def _face_optimizer(self) -> None: ...  # OptimizerHooks

        @property
        def _evaluates(self) -> bool: ...  # EvaluationHooks

        @property
        def _counts_all_replicas(self) -> bool: ...  # BatchHooks

    @property
    def _running_engine(self) -> RunningEngine:
        """The engine, from the beginning of `train()` on."""
        assert self.engine is not None
        return self.engine

    @property
    def _made_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, from `create_optimizer` on; Trainer's attribute is None before."""
        assert self.optimizer is not None
        return self.optimizer
