"""What a stage does with the gradients of an update, and what others may do with its weights while it rests."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import SupportsFloat

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from ..partition import Boundary, Stage
from .averaging import BucketedMean
from .compute_copies import ComputeCopies
from .divided import DividedBackward
from .gradient_hooks import accumulated, hooked
from .in_flight import InFlight
from .noise import StageNoise
from .optimizers import StageOptimizer
from .pending import Pending, due_next
from .randomness import has_dropout
from .reads import ReadCheck
from .settings import EngineSettings, Hyperparameters
from .streams import Memories
from .weights import TiedLink, WeightVersions

Gradients = dict[str, torch.Tensor]


class StageUpdates:
    """The part of a stage that knows updates, and nothing of forwards and backwards.

    Attributes:
        window: gradients of the open update so far, by name.
        keeps_pending: whether the gradients of a settled run are kept, for the updates that will apply them.
    """

    stage: Stage
    index: int
    device: torch.device
    seed: int
    settings: EngineSettings
    memories: Memories
    window: Gradients
    keeps_pending = True
    in_flight: dict[int, InFlight]
    arrived: dict[int, Boundary]
    settled: dict[int, Gradients]
    _divided_backwards: dict[int, tuple[InFlight, DividedBackward, bool]]
    replays_newest: bool
    _predicted_for: int | None
    optimizer: StageOptimizer
    _num_stages: int
    _lends: TiedLink | None
    _versions: WeightVersions
    _link: TiedLink | None
    _mean: BucketedMean | None
    _noise: StageNoise
    _reads: ReadCheck
    _copies: ComputeCopies | None

    def _add_to_window(self, leaves: Gradients) -> None:
        """Lets a backward add to the open update's gradients, as far as nothing else has to be done with its own before."""
        if self._num_stages == 1:
            return  # leaves are the parameters, whose gradients scripts see
        if self.settings.scales_losses:
            return  # a backward computes them in the scale of its own loss
        tied = () if self._link is None else self._link.names  # the other side's gradient is added first
        for name, leaf in leaves.items():
            if name in self.window and name not in tied and leaf.requires_grad:
                parameter = self._versions.parameters[name]
                if not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks:
                    leaf.grad = self.window.pop(name)

    @contextlib.contextmanager
    def _averaging_meanwhile(self, item: InFlight) -> Iterator[None]:
        """Takes every gradient into the window, and hands it to the mean over replicas, as soon as it is complete."""

        def take(name: str, leaf: torch.Tensor) -> None:
            assert leaf.grad is not None and self._mean is not None
            gradient, leaf.grad = leaf.grad, None
            item.unscale({name: gradient})
            self.accumulate({name: gradient}, item.tick)
            self._mean.ready(name, self.window)

        tied = () if self._link is None else self._link.names  # complete only with the other side's gradient
        hooks = [
            leaf.register_post_accumulate_grad_hook(partial(take, name))
            for name, leaf in item.leaves.items()
            if leaf.requires_grad and name not in tied
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def accumulate(self, gradients: Gradients, tick: int = 0) -> None:
        """Adds gradients of a tick, in tick order, to those of the update that is open."""
        for name, gradient in gradients.items():
            parameter = self._versions.parameters[name]
            with self._reads.gradient(parameter):
                gradient = hooked(parameter, gradient, self.seed, self.index, tick, name)
                if name in self.window:
                    self.window[name].add_(gradient)
                else:
                    self.window[name] = gradient
                if (
                    parameter._post_accumulate_grad_hooks
                    and (left := accumulated(parameter, self.window.pop(name))) is not None
                ):
                    self.window[name] = left

    # ---- step ----

    @property
    def has_replicas(self) -> bool:
        """Whether other processes compute the same stage on other rows."""
        return self._mean is not None

    def start_mean(self) -> None:
        """Begins to average what is not being averaged yet of the open update's gradients, where there are replicas."""
        if self._mean is not None:
            self._mean.rest(self.window)

    def finish_mean(self) -> None:
        """Waits until the open update's gradients are averaged."""
        if self._mean is not None:
            self._mean.wait()

    def bound(
        self, norm: torch.Tensor, whole: torch.Tensor, read: Callable[[torch.Tensor], SupportsFloat] = float
    ) -> None:
        """Bounds the open update's gradients; drops them if they, or others that are dropped with them, have overflowed.

        Args:
            norm: of this stage's gradients.
            whole: of those of all stages, where stages share their norms; else not used.
            read: gives the number that a norm is.
        """
        settings = self.settings
        decides = whole if settings.drops_together else norm
        if settings.scales_losses and not math.isfinite(float(read(decides))):
            self.drop()
        elif settings.clip_scope == "stage":
            self.scale(norm, settings.stage_norm_bound(self._num_stages))
        elif settings.max_grad_norm is not None:
            self.scale(whole, settings.max_grad_norm)

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
        """Takes the tied matrices' output-side gradients of a tick at once, as the paper does."""
        if self._link is not None:
            gradients = self._link.gradients.pop(tick, {})
            if gradients:
                self.in_flight[tick].unscale(gradients)
            self.accumulate(gradients, tick)

    def drop(self) -> None:
        """Forgets the open update's gradients, which have overflowed somewhere: closing it will do nothing."""
        self.window = {}

    def step(self, hyperparameters: Hyperparameters, update: int) -> None:
        """Closes an update: applies its gradients, or does nothing at all if there are none."""
        if not self.window:
            return
        self._versions.advance(self._in_use, self.window)
        parameters = self._versions.parameters
        ordered = [(parameters[name], self.window[name]) for name in parameters if name in self.window]
        self.window = {}
        at = self.settings.stage_update(self.index, self._num_stages, update)
        self.optimizer.step(ordered, hyperparameters, at)

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

    # ---- between ticks ----

    @property
    def _in_use(self) -> Collection[str]:
        """Names of the parameters whose present values a pending forward or backward needs."""
        link = self._lends
        if self.replays_newest:  # nothing but what the last stage has borrowed and not finished with
            lent = link is not None and any(tick not in link.gradients for tick in self.in_flight)
            return link.names if link is not None and lent else ()
        pending = self.in_flight or self._divided_backwards or (link is not None and link.weights)
        return self._versions.parameters if pending else ()

    def tensors(self) -> Iterator[torch.Tensor]:
        """What this stage uses, and others may have made while it rested."""
        yield from (p.data for p in self._versions.parameters.values())
        yield from self.stage.buffers()
        yield from self.window.values()
        yield from (t for memory in self.memories.groups.values() for t in memory.values())
        if self.replays_newest:  # as they were read from a checkpoint
            for item in self.in_flight.values():
                yield from (*item.batch.values(), *(item.received or {}).values(), *(item.memory or {}).values())
            yield from (t for gradient in self.arrived.values() for t in gradient.values())
            yield from (t for gradients in self._heads.values() for t in gradients.values())

    def pending(self) -> dict[int, Gradients]:
        """Copies of the settled gradients, or of what pending backwards with weights of now need, by tick."""
        if not self.replays_newest:
            return {tick: {n: g.clone() for n, g in gradients.items()} for tick, gradients in self.settled.items()}
        return {
            tick: Pending(item, self.arrived.get(tick), self._heads.get(tick, {})).tensors()
            for tick, item in self.in_flight.items()
        }

    def take_pending(self, pending: Mapping[int, Gradients]) -> None:
        """Inverse of `pending`."""
        if not self.replays_newest:
            self.settled = {t: {n: g.to("cpu", copy=True) for n, g in found.items()} for t, found in pending.items()}
            return
        found = {t: Pending.of(t, pending[t], self.stage, self.device) for t in sorted(pending)}
        self.in_flight = {tick: each.item for tick, each in found.items()}
        due = due_next(found, self._num_stages - 1 - self.index)
        self.arrived = {} if due is None else {due: found[due].gradient or {}}
        self._heads.update({tick: each.head for tick, each in found.items()})

    @property
    def _heads(self) -> dict[int, Gradients]:
        """Of tied matrices, by tick: the gradients that the last stage has left for the first one."""
        return {} if self._lends is None else self._lends.gradients

    @property
    def has_views(self) -> bool:
        """Whether a script has views of its weights, which it may read or write without anybody noticing."""
        return self._versions.have_views

    def let_go(self) -> None:
        """Lets others write the weights; what is in flight keeps those of its forward."""
        self._versions.let_go(self._in_use)

    def look_again(self) -> None:
        """Takes weights, and what may have been changed about modules, as they are now."""
        self._versions.look_again()
        self.stage.train()
        self._noise.look_again(self.stage.draws or has_dropout(self.stage))
        self._reads.look_again()
        if self._copies is not None:
            self._copies.look_again()

    def expose(self) -> None:
        """Hands the open update's gradients over to the parameters."""
        for name, gradient in self.window.items():
            self._versions.parameters[name].grad = gradient
        self.window = {}

    def exposed(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """The gradients that parameters have, whose weights are to be stepped now; what is in flight keeps the old ones."""
        found = {name: p for name, p in self._versions.parameters.items() if p.grad is not None}
        if found:
            self._versions.advance(self._in_use, found)
        return [(p, p.grad) for p in found.values() if p.grad is not None]

    def _ordered_window(self) -> list[torch.Tensor]:
        return [self.window[name] for name in self._versions.parameters if name in self.window]

    def release(self) -> None:
        """Lets go of activations, gradients, memories and old weights when the run is over."""
        self.in_flight.clear()
        self.arrived.clear()
        self._divided_backwards.clear()
        self.settled.clear()
        self.window.clear()
        self.memories.groups.clear()
        self._versions.look_again()
        if self._link is not None:
            self._link.weights.clear()
            self._link.gradients.clear()
