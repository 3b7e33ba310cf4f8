"""The update rule with weights of now, on one device, in its simplest form: the oracle of every test of weights="now".

Features replay (Huo, Gu, Huang, "Training Neural Networks Using Features Replay", NeurIPS 2018, Algorithm 1; generalised to M
micro-batches per update), also known as diversely stale parameters (Xu, Huo, Huang, 2020). In tick t, with w_k the weights of
now, those after the updates closed before t, and h_k(t) what stage k is given of micro-batch t (h_0(t): the micro-batch itself):

    play      h_{k+1}(t) = F_k(h_k(t); w_k)  for all stages in turn, and the loss; h_k(t) is kept, and nothing else
    replay    with s = t - d_k, stage k computes F_k(h_k(s); w_k) once more, with the same random numbers, and the products of
              its Jacobians with e_{k+1}(s), which stage k+1 has handed over in tick t-1 (the last stage has d_k = 0 and the
              loss's own gradient): one gives e_k(s), for stage k-1 in tick t+1, the other the gradient of w_k

Update u applies to stage k the sum of the gradients of w_k that its own ticks have computed: they are of the same micro-batches
a - d_k .. b - d_k as with weights of then. No older weights are ever needed. But the gradient is none of the loss any more: h_k(s)
was computed by weights of the stages before that are d_k ticks old, and e_{k+1}(s) by weights of the stages after that are one
tick older than w_k, two ticks, and so on.

A tied matrix belongs to stage 0. The last stage plays tick t with the version of stage 0; its side of the gradient waits
K-1 ticks for the other side, as with weights of then.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.func import functional_call

from .engine.between_updates import Gradients
from .engine.in_flight import InFlight, detached, roots_of, shapes_of
from .engine.losses import finishing
from .engine.noise import NoDraws
from .engine.pending import Pending
from .engine.rehearsal import rehearse
from .engine.settings import EngineSettings
from .engine.streams import Segment
from .partition import Boundary, Memory, select
from .partition.ownership import parameter_places
from .reference import Reference
from .reference_fp16 import ReferenceScaled


class ReferenceNow(Reference):
    """As `Reference`, with weights="now"."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._waiting: list[dict[int, Pending]] = [{} for _ in self._owned]  # stage -> tick -> what its replay needs

    def _compute(
        self, tick: int, batch: Mapping[str, Any], context: Any, segment: Segment | None, delayed: bool
    ) -> torch.Tensor:
        if self._alone or not delayed:
            return super()._compute(tick, batch, context, segment, delayed)
        leaves = self._leaves()
        self._output_side[tick] = {}
        loss = self._play(tick, batch, context, segment, leaves)
        for k, waiting in enumerate(self._waiting):
            if (s := tick - (len(self._owned) - 1 - k)) in waiting:
                self._replay(k, s, waiting.pop(s), leaves)
        return loss

    def _play(
        self,
        tick: int,
        batch: Mapping[str, Any],
        context: Any,
        segment: Segment | None,
        leaves: Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        """Forwards of all stages; each notes what it was given. The loss."""
        output: Any = None
        for k, stage in enumerate(self.partition.stages):
            received = None if k == 0 else {n: t.requires_grad_(stage.trains(n, t)) for n, t in output.items()}
            selected = select(stage, batch, self._device)
            item = InFlight(tick, selected, {}, received, self._memories[k].recall(segment))
            if stage.is_last:
                item.full_batch, item.context = batch, context
            made, memory = self._run(k, item, leaves)
            self._memories[k].keep(segment, memory)
            item.shapes = shapes_of(made)
            self._waiting[k][tick] = Pending(item)
            if stage.is_last:
                item.output = made  # there is no delay, so nothing is replayed
            output = detached(made)
        return output

    def _replay(self, k: int, tick: int, pending: Pending, leaves: Mapping[int, torch.Tensor]) -> None:
        """Backward of a micro-batch on one stage."""
        item, tied = pending.item, self.partition.tied if k == 0 else {}
        # Through a view, the head's side of a tied matrix comes first in the sum, as it does in a whole backward.
        views = {id(p): leaves[id(p)].view_as(leaves[id(p)]) for p in tied.values()}
        if item.output is None:
            item.output, _ = self._run(k, item, {**leaves, **views})
        outputs, gradients = roots_of(item.output, pending.gradient, self._device)
        outputs += [views[id(tied[name])] for name in pending.head]
        gradients += [*pending.head.values()]
        if outputs:
            with NoDraws() if self._watches_backward(tick) else nullcontext():
                torch.autograd.backward(outputs, gradients)
        if k > 0:
            self._waiting[k - 1][tick].gradient = item.upstream()
        self._queues[k][tick] = self._taken(k, leaves)
        if self.partition.stages[k].is_last:  # what it has left in leaves of the first stage
            self._waiting[0][tick].head = self._taken(0, leaves)

    def _run(
        self, k: int, item: InFlight, leaves: Mapping[int, torch.Tensor]
    ) -> tuple[Boundary | torch.Tensor, Memory | None]:
        """A stage's forward of what it was given, and its memory afterwards."""
        stage = self.partition.stages[k]
        stage.train()
        weights = {name: leaves.get(id(p), p) for name, p in parameter_places(stage)}
        item.leaves = weights
        rehearse(stage, self._noise[k], self._reads[k], partial(self._attempt, k, item, weights, rehearsal=True))
        return self._attempt(k, item, weights)

    def _attempt(
        self, k: int, item: InFlight, weights: Mapping[str, torch.Tensor], rehearsal: bool = False
    ) -> tuple[Boundary | torch.Tensor, Memory | None]:
        stage, finish = self.partition.stages[k], None
        with self._computing(k, item.tick, weights):
            if stage.is_last and not rehearsal:
                check = partial(self._checks[k].loss, allowed=item.given())
                given = item.full_batch or {}, item.batch, item.context, self._device
                finish = finishing(self._loss_fn, *given, check, self._reads[k])
            received = item.received
            if received is not None and self.settings.autocast_dtype is not None:
                # Of a leaf, autocast keeps what it converts, and adds up the gradients of all its uses in lower precision.
                received = {name: tensor.view_as(tensor) for name, tensor in received.items()}
            memory = None if item.memory is None else dict(item.memory)
            output = functional_call(stage, dict(weights), (item.batch, received, memory, finish), tie_weights=False)
            self._checks[k].forward([output] if stage.is_last else output.values(), item.given())
        return output, memory

    def _pending(self, k: int) -> dict[int, Gradients]:
        return {tick: pending.tensors() for tick, pending in self._waiting[k].items()}

    def _take_pending(self, k: int, pending: Mapping[int, Gradients]) -> None:
        stage = self.partition.stages[k]
        self._waiting[k] = {t: Pending.of(t, pending[t], stage, self._device) for t in sorted(pending)}


def reference_of(settings: EngineSettings) -> type[Reference]:
    """The reference of a run's update rule."""
    if settings.weights == "now":
        return ReferenceNow
    return ReferenceScaled if settings.scales_losses else Reference
