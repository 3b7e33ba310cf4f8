"""Forward, backward and step of one stage, with its micro-batches in flight and its gradients to come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from ..partition import Partition, select
from .optimizers import StageOptimizer
from .randomness import has_dropout, seeded_dropout
from .settings import EngineSettings, Hyperparameters, LossFunction
from .weights import TiedLink, WeightVersions

Gradients = dict[str, torch.Tensor]


@dataclass
class InFlight:
    """A micro-batch between its forward and its backward on one stage."""

    tick: int
    batch: dict[str, torch.Tensor]
    leaves: dict[str, torch.Tensor]
    hidden: torch.Tensor | None
    full_batch: Mapping[str, Any] | None = None
    context: Any = None
    output: torch.Tensor | None = field(default=None, repr=False)


class ReplicaMean(Protocol):
    """Averages gradients over data-parallel replicas."""

    def start(self, gradients: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Begins to average tensors, in place; the function returned waits until that is done."""


class StageRunner:
    """One stage at work. It knows ticks, but neither other stages nor the order of things.

    Args:
        partition: the split model.
        stage: index k of this stage.
        device: where it computes.
        loss_fn: used by the last stage only.
        settings: settings of the run.
        link: shared by first and last stage of a model with tied embeddings, else None.
        replica_mean: averages the gradients of an update over replicas; None for a single replica.
    """

    def __init__(
        self,
        partition: Partition,
        stage: int,
        device: torch.device,
        loss_fn: LossFunction,
        settings: EngineSettings,
        link: TiedLink | None,
        replica_mean: ReplicaMean | None = None,
    ):
        self.stage = partition.stages[stage]
        self.index = stage
        self.device = device
        self.settings = settings
        self.seed = settings.seed
        self.in_flight: dict[int, InFlight] = {}
        self.settled: dict[int, Gradients] = {}
        self.window: Gradients = {}
        self.optimizer: StageOptimizer | None = None
        self.replica_mean = replica_mean
        self._mean_is_done: Callable[[], None] | None = None
        self._num_stages = partition.plan.num_stages
        self._predicted_for: int | None = None
        self._loss_fn = loss_fn
        self._link = link if self.stage.is_first or self.stage.is_last else None
        self._versions = WeightVersions(partition.owned(stage))
        leaf_names = {id(p): name for name, p in self._versions.parameters.items()}
        if link is not None:
            leaf_names[id(partition.tied)] = link.name
        self._bindings = [(name, leaf_names[id(p)]) for name, p in self.stage.named_parameters(remove_duplicate=False)]
        self._dropout = has_dropout(self.stage)

    @property
    def borrows(self) -> bool:
        """Whether this stage uses the tied matrix of a first stage that is another stage."""
        return self._link is not None and not self.stage.is_first

    @property
    def _lends(self) -> bool:
        return self._link is not None and not self.stage.is_last

    # ---- forward ----

    def predict(self, update: int, hyperparameters: Hyperparameters) -> None:
        """Lets the forwards of an update use predicted weights; the first of them asks for it.

        Args:
            update: the update that the forwards belong to.
            hyperparameters: as they were when it opened.
        """
        if update == self._predicted_for:
            return
        self._predicted_for = update
        at = self.settings.stage_update(self.index, self._num_stages, update)
        found = self.optimizer.predictions(hyperparameters, at)
        parameters = self._versions.parameters
        self._versions.predict({name: found[id(p)] for name, p in parameters.items() if id(p) in found})

    def forward(self, tick: int, batch: Mapping[str, Any], context: Any, hidden: torch.Tensor | None) -> torch.Tensor:
        """Forward of a micro-batch.

        Args:
            tick: the micro-batch's number.
            batch: the micro-batch; each stage takes what it needs to its device.
            context: handed to the loss function.
            hidden: output of the stage before, [batch, time, width]; None on the first stage.

        Returns:
            The detached hidden state for the next stage, or the detached scalar loss on the last one.
        """
        leaves = dict(self._versions.leaves())
        if self.borrows:
            lent = self._link.weights.pop(tick)
            leaves[self._link.name] = lent.data.requires_grad_(lent.requires_grad)
        elif self._lends:
            self._link.weights[tick] = leaves[self._link.name]
        if hidden is not None:
            hidden = hidden.to(self.device, non_blocking=True).detach().requires_grad_(True)
        item = InFlight(tick, select(self.stage.family, batch, self.device), leaves, hidden)
        if self.stage.is_last:
            item.full_batch, item.context = batch, context
        self.in_flight[tick] = item
        if self.settings.recompute and not self.stage.is_last:
            with torch.no_grad():
                return self._compute(item)
        item.output = self._compute(item)
        return item.output.detach()

    def _compute(self, item: InFlight) -> torch.Tensor:
        # Evaluation between ticks leaves modules in eval mode; a replayed forward has to be a training forward.
        if not self.stage.training:
            self.stage.train()
        with contextlib.ExitStack() as scopes:
            if self._dropout:
                scopes.enter_context(seeded_dropout(self.seed, self.index, item.tick, self.device))
            if self.settings.autocast_dtype is not None:
                scopes.enter_context(torch.autocast(self.device.type, dtype=self.settings.autocast_dtype))
            weights = {name: item.leaves[source] for name, source in self._bindings}
            output = functional_call(self.stage, weights, (item.batch, item.hidden), tie_weights=False)
            if self.stage.is_last:
                output = self._loss_fn(output, item.full_batch, item.context)
            return output

    # ---- backward ----

    def backward(self, tick: int, gradient: torch.Tensor | None) -> tuple[Gradients, torch.Tensor | None]:
        """Backward of a micro-batch with the weights and masks of its forward.

        Args:
            tick: the micro-batch's number.
            gradient: of the loss with respect to this stage's output; None on the last stage.

        Returns:
            The stage's parameter gradients, and the gradient for the stage before (None on the first stage).
        """
        item = self.in_flight.pop(tick)
        if item.output is None:
            item.output = self._compute(item)
        if gradient is not None:
            gradient = gradient.to(self.device, non_blocking=True)
        if item.output.requires_grad and (gradient is not None or self.stage.is_last):
            torch.autograd.backward(item.output, gradient)
        gradients: Gradients = {}
        for name, leaf in item.leaves.items():
            if leaf.grad is not None:
                gradients[name], leaf.grad = leaf.grad, None
        if self.borrows and self._link.name in gradients:
            self._link.gradients[tick] = gradients.pop(self._link.name)
        elif self._lends and tick in self._link.gradients:
            gradients[self._link.name].add_(self._link.gradients.pop(tick))
        return gradients, None if item.hidden is None else item.hidden.grad

    def accumulate(self, gradients: Gradients) -> None:
        """Adds gradients, in tick order, to those of the update that is open."""
        for name, gradient in gradients.items():
            if name in self.window:
                self.window[name].add_(gradient)
            else:
                self.window[name] = gradient

    # ---- step ----

    def start_mean(self) -> None:
        """Begins to average the open update's gradients over the replicas, where there are several."""
        if self.replica_mean is not None and self.window:
            self._mean_is_done = self.replica_mean.start(self._ordered_window())

    def finish_mean(self) -> None:
        """Waits until the open update's gradients are averaged."""
        if self._mean_is_done is not None:
            self._mean_is_done()
            self._mean_is_done = None

    def clip(self, bound: float) -> torch.Tensor | None:
        """Norm of the open update's gradients, which are then scaled to at most `bound`; None without any."""
        norm = self.norm()
        if norm is not None:
            self.scale(norm, bound)
        return norm

    def norm(self) -> torch.Tensor | None:
        """Euclidean norm of the open update's gradients; None if there are none."""
        return get_total_norm(self._ordered_window()) if self.window else None

    def scale(self, norm: torch.Tensor, bound: float) -> None:
        """Scales the open update's gradients by bound / norm if norm is larger."""
        if bound != float("inf"):
            factor = torch.clamp(bound / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
            for gradient in self.window.values():
                gradient.mul_(factor.to(gradient.device))

    def add_output_side(self, tick: int) -> None:
        """Takes the tied matrix's output-side gradient of a tick at once, as the paper does."""
        if (gradient := self._link.gradients.pop(tick, None)) is not None:
            self.accumulate({self._link.name: gradient})

    def step(self, hyperparameters: Hyperparameters, update: int) -> None:
        """Closes an update: applies its gradients, or does nothing at all if there are none."""
        if not self.window:
            return
        self._versions.advance(in_use=bool(self.in_flight) or (self._lends and bool(self._link.weights)))
        parameters = self._versions.parameters
        ordered = [(parameters[name], self.window[name]) for name in parameters if name in self.window]
        self.window = {}
        at = self.settings.stage_update(self.index, self._num_stages, update)
        self.optimizer.step(ordered, hyperparameters, at)

    def release(self) -> None:
        """Lets go of activations, gradients and old weights when the run is over."""
        self.in_flight.clear()
        self.settled.clear()
        self.window.clear()
        if self._link is not None:
            self._link.weights.clear()
            self._link.gradients.clear()

    def _ordered_window(self) -> list[torch.Tensor]:
        return [self.window[name] for name in self._versions.parameters if name in self.window]
