"""Forward, backward and step of one stage, with its micro-batches in flight and its gradients to come."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..partition import Boundary, Finish, Memory, Partition, select, to_device
from ..partition.ownership import parameter_places
from .averaging import BucketedMean, ReplicaMean
from .compute_copies import ComputeCopies
from .divided import DividedBackward
from .gradient_hooks import calls_backward_hooks, first_part, refuse_on_halves, second_part, stage_backward
from .graph import GraphCheck
from .host_copies import known, plain_positions
from .in_flight import BufferCheck, InFlight, are_equal, detached, roots_of, shapes_of
from .kept_state import KeptState
from .losses import LossFunction, LossOfModel, finishing
from .noise import StageNoise
from .places import Places
from .randomness import has_dropout
from .reads import ReadCheck
from .rehearsal import rehearse
from .settings import EngineSettings
from .stage_updates import Gradients, StageUpdates
from .streams import Memories, Segment
from .weights import TiedLink, WeightVersions


class StageRunner(StageUpdates):
    """One stage at work. It knows ticks, but neither other stages nor the order of things.

    Args:
        partition: the split model.
        stage: index k of this stage.
        device: where it computes.
        loss_fn: used by the last stage only.
        settings: settings of the run.
        link: shared by first and last stage of a model with tied embeddings, else None.
        replica_mean: averages the gradients of an update over replicas; None for a single replica.

    Attributes:
        replays_newest: whether backwards replay their forward with the newest weights.
        arrived: gradients of this stage's outputs, by tick, that came before the slot of their backward.
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
        self.arrived: dict[int, Boundary] = {}
        self._divided_backwards: dict[int, tuple[InFlight, DividedBackward, bool]] = {}
        self.settled: dict[int, Gradients] = {}
        self.window: Gradients = {}
        self.memories = Memories()
        self._num_stages = partition.plan.num_stages
        self._predicted_for: int | None = None
        self._loss_fn = loss_fn
        self._link = link if self.stage.is_first or self.stage.is_last else None
        self._lends = None if self.stage.is_last else self._link
        self._borrows = None if self.stage.is_first else self._link
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
        self._places = Places(self.stage, [place for place, _ in self._bindings])
        # A tied matrix that the embeddings use several times: what the head adds to its gradient comes first.
        uses = Counter(source for _, source in self._bindings)
        self._meeting = [n for n in (() if self._lends is None else self._lends.names) if uses[n] > 1]
        self._noise = StageNoise(stage, self.stage.draws or has_dropout(self.stage))
        self._kept = KeptState(self.stage, isinstance(loss_fn, LossOfModel) and loss_fn.is_of_script)
        self._replayed_by = None if self.stage.is_last else settings.replayed_by
        self.replays_newest = settings.replays_newest and not self.stage.is_last
        self._buffers = BufferCheck(self.stage, self._replayed_by)
        self._backwards, self._modules = 0, list(self.stage.modules())
        # The last stage, whose forward a comparison would repeat with the loss, keeps one graph, or those of divided backwards; a
        # stage that replays keeps none.
        dtype = None if self.stage.is_last or self._replayed_by else settings.autocast_dtype
        self._copies = None if dtype is None else ComputeCopies(self.stage, self._bindings, dtype)
        refuse_on_halves(partition.tied, settings)

    @property
    def borrows(self) -> bool:
        """Whether this stage uses the tied matrices of a first stage that is another stage."""
        return self._borrows is not None

    # ---- forward ----

    def forward(
        self,
        tick: int,
        batch: Mapping[str, Any],
        context: Any,
        received: Boundary | None,
        segment: Segment | None = None,
        scale: float | None = None,
    ) -> Boundary | torch.Tensor:
        """Forward of a micro-batch.

        Args:
            tick: the micro-batch's number.
            batch: the micro-batch; each stage takes what it needs to its device.
            context: handed to the loss function.
            received: output of the stage before; None on the first stage.
            segment: the micro-batch's place in a stream, whose memory it uses and renews; None for no memory.
            scale: of its loss, by which gradients of weights are divided; None for none.

        Returns:
            What the next stage receives, detached, or the detached scalar loss on the last one.
        """
        leaves = dict(self._versions.leaves())
        if (link := self._borrows) is not None:
            for name, lent in link.weights.pop(tick).items():
                leaves[name] = lent.data.requires_grad_() if lent.requires_grad else lent
        elif (link := self._lends) is not None:
            link.weights[tick] = {name: leaves[name] for name in link.names}
        if received is not None:
            received = {
                name: tensor.detach().requires_grad_(self.stage.trains(name, tensor))
                for name, tensor in to_device(received, self.device).items()
            }
        memory = self.memories.recall(segment)
        selected = known(select(self.stage, batch, self.device), batch)
        item = InFlight(tick, selected, leaves, received, memory, copies=self._versions.copies, scale=scale)
        if self.stage.is_last:
            item.full_batch, item.context = batch, context
        self.in_flight[tick] = item
        output, memory = self._compute(item)
        self._buffers.forward()
        self._kept.forward()
        self.memories.keep(segment, memory)
        # What will be replayed has a graph, too, which is dropped here: without one, torch may choose kernels (of attention
        # with an additive mask, for instance) that round in another way than the replay.
        if self._replayed_by is None:
            item.output = output
        elif self.replays_newest:
            item.shapes = shapes_of(output)
            item.forget_weights()
        return detached(output)

    def _replay(self, item: InFlight) -> Boundary | torch.Tensor:
        """A forward once more, with its own weights, or with the newest ones."""
        item.leaves = item.leaves or dict(self._versions.leaves())
        return self._compute(item)[0]

    def _compute(self, item: InFlight) -> tuple[Boundary | torch.Tensor, Memory | None]:
        """Output and memory of a forward, which leaves what it was given as it is: it may be replayed."""
        rehearse(self.stage, self._noise, self._reads, lambda: self._attempt(item, None, rehearsal=True))
        copies = None if self._reads.has_script else self._copies
        if copies is None:
            return self._attempt(item, None)
        found = None if copies.proven else self._attempt(item, None)
        shared = self._attempt(item, copies)
        if found is not None:
            copies.proven = are_equal(found[0], shared[0])
            if not copies.proven:
                self._copies = None
                item.copies.clear()
                return found
        self._versions.forgo(copies.standing_in(item.copies))
        return shared

    def _attempt(
        self, item: InFlight, copies: ComputeCopies | None, rehearsal: bool = False
    ) -> tuple[Boundary | torch.Tensor, Memory | None]:
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
            if self.stage.is_last and not rehearsal:
                assert item.full_batch is not None
                check = None if self._check is None else partial(self._check.loss, allowed=item.given())
                given = item.full_batch, item.batch, item.context, self.device
                finish = finishing(self._loss_fn, *given, check, self._reads)
            received = item.received
            if received is not None and self.settings.autocast_dtype is not None:
                # Of a leaf, autocast keeps what it converts, and adds up the gradients of all its uses in lower precision.
                received = {name: tensor.view_as(tensor) for name, tensor in received.items()}
            arguments = item.batch, received, memory, finish
            with self._places.holding(weights):
                output = self.stage(*arguments)
            if self._check is not None:
                self._check.forward([output] if self.stage.is_last else output.values(), item.given())
        return output, memory

    # ---- backward ----

    def backward(
        self, tick: int, gradient: Boundary | None, closing: bool = False, adding: bool = False
    ) -> tuple[Gradients, Boundary | None]:
        """Backward of a micro-batch with the masks and weights of its forward, or with the newest weights.

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
            item.output = self._replay(item)
        outputs, output_gradients = roots_of(item.output, gradient, self.device, item.scale)
        tied = {} if (link := self._lends) is None else link.gradients.pop(tick, {})
        for name in tied.keys() & item.meeting.keys():
            outputs.append(item.meeting[name])
            output_gradients.append(tied.pop(name))
        if adding:
            self._add_to_window(item.leaves)
        if outputs:
            averaging = closing and self.has_replicas
            with self._averaging_meanwhile(item) if averaging else contextlib.nullcontext():
                self._backwards += 1
                watched = self._backwards <= self.settings.micro_batches
                weights = None
                if calls_backward_hooks(self._modules):
                    weights = {name: item.leaves[source] for name, source in self._bindings}
                alone: Iterable[nn.Parameter] = self._versions.parameters.values() if self._num_stages == 1 else ()
                with self._reads.backward(item.leaves) as hooks:
                    stage_backward(self.stage, weights, outputs, output_gradients, alone, watched, hooks)
        gradients = item.taken()
        self._give_back(tick, gradients)
        for name, output_side in tied.items():
            if name in gradients:
                gradients[name].add_(output_side)
            else:  # the embedding was not used, as with inputs_embeds
                gradients[name] = output_side
        item.unscale(gradients)
        return gradients, item.upstream()

    def input_gradient(self, tick: int, gradient: Boundary | None) -> Boundary | None:
        """The part of a backward that the stage before waits for; `weight_gradients` has to follow, in tick order.

        Args:
            tick: the micro-batch's number.
            gradient: as for `backward`.

        Returns:
            The gradient for the stage before.
        """
        item = self.in_flight[tick]
        if item.output is None and gradient:
            item.output = self._replay(item)
        divided, output_gradients = self._divided(item, gradient)
        if divided is None or not divided.is_worth_it:
            for earlier in sorted(self._divided_backwards):
                self.weight_gradients(earlier)
            gradients, upstream = self.backward(tick, gradient, adding=True)
            self.accumulate(gradients, tick)
            return upstream
        del self.in_flight[tick]
        self._backwards += 1
        watched = self._backwards <= self.settings.micro_batches
        with self._reads.backward(item.leaves) as hooks:
            first_part(divided, output_gradients, watched, hooks)
        item.gradients, item.output = item.taken(), None
        self._divided_backwards[tick] = item, divided, watched
        upstream, item.received = item.upstream(), None
        return upstream

    def _divided(
        self, item: InFlight, gradient: Boundary | None
    ) -> tuple[DividedBackward | None, list[torch.Tensor | None]]:
        """The backward of a micro-batch in two parts, and the gradients of its outputs; None where it has to stay whole."""
        inputs = [t for t in (item.received or {}).values() if t.requires_grad]
        if item.output is None or not inputs or self._reads.saw_hooks or calls_backward_hooks(self._modules):
            return None, []
        outputs, gradients = roots_of(item.output, gradient, self.device, item.scale)
        return DividedBackward(outputs, inputs, [x for x in item.leaves.values() if x.requires_grad]), gradients

    def weight_gradients(self, tick: int, closing: bool = False) -> None:
        """What `input_gradient` has left of a backward; the gradients go to the window.

        Args:
            tick: the micro-batch's number.
            closing: as for `backward`.
        """
        if tick not in self._divided_backwards:  # it stayed whole
            return
        item, divided, watched = self._divided_backwards.pop(tick)
        averaging = closing and self.has_replicas
        if not averaging:
            self._add_to_window({name: leaf for name, leaf in item.leaves.items() if name not in item.gradients})
        with self._averaging_meanwhile(item) if averaging else contextlib.nullcontext():
            with self._reads.backward(item.leaves):
                second_part(divided, watched)
        gradients = item.taken() | item.gradients
        self._give_back(tick, gradients)
        item.unscale(gradients)
        self.accumulate({name: gradients[name] for name in item.leaves if name in gradients}, tick)

    def _give_back(self, tick: int, gradients: Gradients) -> None:
        """Takes those of borrowed matrices out, for the stage that they belong to."""
        if (link := self._borrows) is not None:
            link.gradients[tick] = {n: gradients.pop(n) for n in link.names if n in gradients}
