"""Forward, backward and step of one stage, with its micro-batches in flight and its gradients to come."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from ..partition import Boundary, Finish, Memory, Partition, select, to_device
from ..partition.ownership import parameter_places
from .averaging import BucketedMean, ReplicaMean
from .compute_copies import ComputeCopies
from .gradient_hooks import accumulated, calls_backward_hooks, hooked, refuse_on_halves, stage_backward
from .graph import GraphCheck
from .host_copies import known, plain_positions
from .in_flight import BufferCheck, InFlight, detached, roots_of
from .kept_state import KeptState
from .losses import LossFunction, LossOfModel, finishing
from .noise import StageNoise
from .optimizers import StageOptimizer
from .randomness import has_dropout
from .reads import ReadCheck
from .settings import EngineSettings, Hyperparameters
from .streams import Memories, Segment
from .weights import TiedLink, WeightVersions

Gradients = dict[str, torch.Tensor]


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
        self.memories = Memories()
        self._num_stages = partition.plan.num_stages
        self._predicted_for: int | None = None
        self._loss_fn = loss_fn
        self._link = link if self.stage.is_first or self.stage.is_last else None
        alone = self._num_stages == 1
        owned = [partition.owned(k) for k in range(self._num_stages)]
        self._versions = WeightVersions(owned[stage], direct=alone)
        self._check = None if alone else GraphCheck(partition.model, stage)
        self._reads = ReadCheck(partition.model, self.stage, owned, settings)
        self._mean = None if replica_mean is None else BucketedMean(replica_mean, self._versions.parameters)
        leaf_names = {id(p): name for name, p in self._versions.parameters.items()}
        if link is not None:
            leaf_names |= {id(parameter): name for name, parameter in partition.tied.items()}
        self._bindings = [(name, leaf_names[id(p)]) for name, p in parameter_places(self.stage)]
        # A tied matrix that the embeddings use several times: what the head adds to its gradient comes first.
        uses = Counter(source for _, source in self._bindings)
        self._meeting = [name for name in link.names if uses[name] > 1] if self._lends else []
        self._noise = StageNoise(stage, self.stage.draws or has_dropout(self.stage))
        self._kept = KeptState(self.stage, isinstance(loss_fn, LossOfModel) and loss_fn.is_of_script)
        self._buffers = BufferCheck(self.stage, replayed=settings.recompute and not self.stage.is_last)
        self._backwards, self._modules = 0, list(self.stage.modules())
        # The last stage has one micro-batch in flight, and a stage that recomputes keeps no graph.
        shares = not (self.stage.is_last or settings.recompute or settings.autocast_dtype is None)
        self._copies = ComputeCopies(self.stage, self._bindings, settings.autocast_dtype) if shares else None
        refuse_on_halves(partition.tied, settings)

    @property
    def borrows(self) -> bool:
        """Whether this stage uses the tied matrices of a first stage that is another stage."""
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

    def forward(
        self,
        tick: int,
        batch: Mapping[str, Any],
        context: Any,
        received: Boundary | None,
        segment: Segment | None = None,
    ) -> Boundary | torch.Tensor:
        """Forward of a micro-batch.

        Args:
            tick: the micro-batch's number.
            batch: the micro-batch; each stage takes what it needs to its device.
            context: handed to the loss function.
            received: output of the stage before; None on the first stage.
            segment: the micro-batch's place in a stream, whose memory it uses and renews; None for no memory.

        Returns:
            What the next stage receives, detached, or the detached scalar loss on the last one.
        """
        leaves = dict(self._versions.leaves())
        if self.borrows:
            for name, lent in self._link.weights.pop(tick).items():
                leaves[name] = lent.data.requires_grad_() if lent.requires_grad else lent
        elif self._lends:
            self._link.weights[tick] = {name: leaves[name] for name in self._link.names}
        if received is not None:
            received = {
                name: tensor.detach().requires_grad_(self.stage.trains(name, tensor))
                for name, tensor in to_device(received, self.device).items()
            }
        memory = self.memories.recall(segment)
        selected = known(select(self.stage, batch, self.device), batch)
        item = InFlight(tick, selected, leaves, received, memory, copies=self._versions.copies)
        if self.stage.is_last:
            item.full_batch, item.context = batch, context
        self.in_flight[tick] = item
        output, memory = self._compute(item)
        self._buffers.forward()
        self._kept.forward()
        self.memories.keep(segment, memory)
        # What will be replayed has a graph, too, which is dropped here: without one, torch may choose kernels (of attention
        # with an additive mask, for instance) that round in another way than the replay.
        if self.stage.is_last or not self.settings.recompute:
            item.output = output
        return detached(output)

    def _compute(self, item: InFlight) -> tuple[Boundary | torch.Tensor, Memory | None]:
        """Output and memory of a forward, which leaves what it was given as it is: it may be replayed."""
        copies = None if self._reads.has_script else self._copies
        if copies is None or copies.proven:
            return self._attempt(item, copies)
        found, shared = self._attempt(item, None), self._attempt(item, copies)
        copies.proven = all(torch.equal(value, shared[0][name]) for name, value in found[0].items())
        if copies.proven:
            return shared
        self._copies = None
        item.copies.clear()
        return found

    def _attempt(self, item: InFlight, copies: ComputeCopies | None) -> tuple[Boundary | torch.Tensor, Memory | None]:
        # Evaluation between ticks leaves modules in eval mode; a replayed forward has to be a training forward.
        if not self.stage.training:
            self.stage.train()
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(self._reads.forward(item.leaves))
            scopes.enter_context(self._noise.scope(self.seed, item.tick, self.device))
            scopes.enter_context(plain_positions(item.batch, self.device))
            if self.settings.autocast_dtype is not None:
                scopes.enter_context(torch.autocast(self.device.type, dtype=self.settings.autocast_dtype))
            item.meeting = {name: item.leaves[name].view_as(item.leaves[name]) for name in self._meeting}
            weights = {name: item.meeting.get(source, item.leaves[source]) for name, source in self._bindings}
            if copies is not None:
                weights |= copies.of(item.leaves, item.copies)
            memory = None if item.memory is None else dict(item.memory)
            finish: Finish | None = None
            if self.stage.is_last:
                check = None if self._check is None else partial(self._check.loss, allowed=item.given())
                given = item.full_batch, item.batch, item.context, self.device
                finish = finishing(self._loss_fn, *given, check, self._reads)
            received = item.received
            if received is not None and self.settings.autocast_dtype is not None:
                # Of a leaf, autocast keeps what it converts, and adds up the gradients of all its uses in lower precision.
                received = {name: tensor.view_as(tensor) for name, tensor in received.items()}
            arguments = item.batch, received, memory, finish
            output = functional_call(self.stage, weights, arguments, tie_weights=False)
            if self._check is not None:
                self._check.forward([output] if self.stage.is_last else output.values(), item.given())
        return output, memory

    # ---- backward ----

    def backward(
        self, tick: int, gradient: Boundary | None, closing: bool = False, adding: bool = False
    ) -> tuple[Gradients, Boundary | None]:
        """Backward of a micro-batch with the weights and masks of its forward.

        Args:
            tick: the micro-batch's number.
            gradient: of the loss with respect to this stage's output, by name; None on the last stage.
            closing: whether the open update ends with this micro-batch. Where there are replicas, its gradients then go
                straight to the window, and their mean begins layer by layer while the backward is still running.
            adding: whether the gradients are going to be accumulated at once. Those of the open update may then be added
                to while they are computed, so that no second set of them exists.

        Returns:
            The stage's parameter gradients as far as they are not in the window yet, and the gradient for the stage before
            (None on the first stage). With `adding`, what was in the window is in them, and no longer there.
        """
        item = self.in_flight.pop(tick)
        if item.output is None and not gradient:  # nothing is trained here or before
            return {}, None if item.received is None else {}
        if item.output is None:
            item.output, _ = self._compute(item)
        outputs, output_gradients = roots_of(item.output, gradient, self.device)
        tied = self._link.gradients.pop(tick, {}) if self._lends else {}
        for name in tied.keys() & item.meeting.keys():
            outputs.append(item.meeting[name])
            output_gradients.append(tied.pop(name))
        if adding:
            self._add_to_window(item.leaves)
        if outputs:
            averaging = closing and self.has_replicas
            with self._averaging_meanwhile(tick, item.leaves) if averaging else contextlib.nullcontext():
                self._backwards += 1
                watched = self._backwards <= self.settings.micro_batches
                weights = None
                if calls_backward_hooks(self._modules):
                    weights = {name: item.leaves[source] for name, source in self._bindings}
                alone = self._versions.parameters.values() if self._num_stages == 1 else ()
                with self._reads.backward(item.leaves) as hooks:
                    stage_backward(self.stage, weights, outputs, output_gradients, alone, watched, hooks)
        gradients: Gradients = {}
        for name, leaf in item.leaves.items():
            if leaf.requires_grad and leaf.grad is not None:
                gradients[name], leaf.grad = leaf.grad, None
        if self.borrows:
            self._link.gradients[tick] = {n: gradients.pop(n) for n in self._link.names if n in gradients}
        for name, output_side in tied.items():
            if name in gradients:
                gradients[name].add_(output_side)
            else:  # the embedding was not used, as with inputs_embeds
                gradients[name] = output_side
        if item.received is None:
            return gradients, None
        # What had no effect on the loss has a gradient of zeros: the stage before waits for one.
        return gradients, {
            name: torch.zeros_like(t) if t.grad is None else t.grad
            for name, t in item.received.items()
            if t.requires_grad
        }

    def _add_to_window(self, leaves: Gradients) -> None:
        """Lets a backward add to the open update's gradients, as far as nothing else has to be done with its own before."""
        if self._num_stages == 1:
            return  # leaves are the parameters, whose gradients scripts see
        tied = () if self._link is None else self._link.names  # the other side's gradient is added first
        for name, leaf in leaves.items():
            if name in self.window and name not in tied and leaf.requires_grad:
                parameter = self._versions.parameters[name]
                if not parameter._backward_hooks and not parameter._post_accumulate_grad_hooks:
                    leaf.grad = self.window.pop(name)

    @contextlib.contextmanager
    def _averaging_meanwhile(self, tick: int, leaves: Gradients) -> Iterator[None]:
        """Takes every gradient into the window, and hands it to the mean over replicas, as soon as it is complete."""

        def take(name: str, leaf: torch.Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            self.accumulate({name: gradient}, tick)
            self._mean.ready(name, self.window)

        tied = () if self._link is None else self._link.names  # complete only with the other side's gradient
        hooks = [
            leaf.register_post_accumulate_grad_hook(partial(take, name))
            for name, leaf in leaves.items()
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
        """Takes the tied matrices' output-side gradients of a tick at once, as the paper does."""
        self.accumulate(self._link.gradients.pop(tick, {}), tick)

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

    # ---- what scripts may do between ticks ----

    @property
    def _in_use(self) -> bool:
        """Whether a pending forward or backward needs the present weights."""
        return bool(self.in_flight) or (self._lends and bool(self._link.weights))

    def tensors(self) -> Iterator[torch.Tensor]:
        """What this stage uses, and others may have made while it rested."""
        yield from (p.data for p in self._versions.parameters.values())
        yield from self.stage.buffers()
        yield from self.window.values()
        yield from (t for memory in self.memories.groups.values() for t in memory.values())

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
        return [(p, p.grad) for p in found.values()]

    def release(self) -> None:
        """Lets go of activations, gradients, memories and old weights when the run is over."""
        self.in_flight.clear()
        self.settled.clear()
        self.window.clear()
        self.memories.groups.clear()
        self._versions.look_again()
        if self._link is not None:
            self._link.weights.clear()
            self._link.gradients.clear()

    def _ordered_window(self) -> list[torch.Tensor]:
        return [self.window[name] for name in self._versions.parameters if name in self.window]
