"""The update rule of Ouroboros on one device, in its simplest form: the oracle of every test.

Notation (Yang et al., NeurIPS 2019, Algorithm 1, generalised to M micro-batches per update): stage k of K has the
delay d_k = K-1-k, counted in ticks (micro-batches). All stages compute tick t with the same weights, those after the
updates closed before t. Update u, with its own ticks a..b, applies to stage k

    g_k[u] = sum of the gradients of stage k at the ticks a - d_k .. b - d_k   (as far as they exist)

each taken at the weights of its own tick. No tick in that window: no step at all, no decay, no count. During the
first W updates (delay warm-up) all delays are 0; afterwards only ticks from the first delayed one on count.

Recurrent memories (Transformer-XL) are inputs: what a stage keeps of a tick, detached, its forward of the next tick of
the same stream reads.

Delay compensation (`optim/`) may change two things. A step: stage k's clipped gradient and learning rate, by what the
optimizer's state says. And the weights of a tick: with weight prediction, stage k computes all ticks of an update with
p_k(w_k, optimizer state, hyper-parameters when the update opened; d_k/M updates ahead) in the place of its real weights
w_k, the last stage using stage 0's predicted matrix where embeddings are tied. A gradient is then the exact gradient of
one loss at one consistent set of predicted weights, and is applied to the real ones.

Because every gradient belongs to one consistent set of weights, it can be computed at once and merely applied late:
one ordinary backward per tick and a queue of gradients per stage are the whole algorithm. The schedules of the
engine only change when things happen.

That is the rule with weights of then. With weights="now" a gradient is taken at the weights that it is applied to, for inputs
of d_k ticks ago: `reference_now.py`. In float16 losses are scaled, and gradients that overflow are dropped: `reference_fp16.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .engine.at_once import AtOnce
from .engine.between_updates import Gradients
from .engine.exposed import own_threads
from .engine.gradient_hooks import accumulated, calls_backward_hooks, hooked, refuse_on_halves, silenced
from .engine.graph import GraphCheck, nodes_of
from .engine.losses import LossFunction, finishing
from .engine.noise import NoDraws, StageNoise
from .engine.optimizers import snapshot_hyperparameters
from .engine.randomness import has_dropout
from .engine.reads import ReadCheck
from .engine.rehearsal import rehearse
from .engine.settings import EngineSettings, FinishedLoss, FinishedNorm
from .engine.streams import Memories, Segment, Streams
from .errors import EngineError
from .optim import compensated_step, predictions
from .partition import Boundary, Partition, select, torch_device
from .partition.ownership import parameter_places


class Reference(AtOnce):
    """Same interface as `engine.core.Engine`, no threads, no pipeline; what is no part of the rule is in `AtOnce`.

    Args:
        partition: the model split into K stages, all on one device.
        optimizer: any torch optimizer of the whole model.
        loss_fn: (logits, micro-batch, context) -> scalar.
        settings: settings of the run.
    """

    def __init__(
        self,
        partition: Partition,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        settings: EngineSettings,
        timeline: None = None,
    ):
        self.partition = partition
        self.optimizer = optimizer
        self.settings = settings
        self.timeline = timeline
        self.grad_norm: float | None = None
        self._loss_fn = loss_fn
        self._alone = partition.plan.num_stages == 1
        self._seed = settings.seed
        self._device = torch_device(partition.plan.devices[0])
        self._owned = [partition.owned(k) for k in range(partition.plan.num_stages)]
        self._tick = self._update = self._first_tick = 0
        self._delay_start: int | None = None
        self._queues: list[dict[int, Gradients]] = [{} for _ in self._owned]  # stage -> tick -> gradients
        self._output_side: dict[int, Gradients] = {}  # tied_gradient="paper": tick -> gradients of the head's side
        self._noise = [StageNoise(k, s.draws or has_dropout(s)) for k, s in enumerate(partition.stages)]
        self._checks = [GraphCheck(partition.model, k) for k in range(len(self._owned))]
        self._reads = [ReadCheck(partition.model, stage, self._owned, settings) for stage in partition.stages]
        refuse_on_halves(partition.tied, settings)
        self._streams, self._memories = Streams(), [Memories() for _ in self._owned]
        self._finished: list[FinishedLoss] = []
        self._norms: list[FinishedNorm] = []
        self._exposed = False  # whether the open update's gradients are in `grad` of the parameters
        self._predicted: dict[int, torch.Tensor] = {}  # id of a parameter -> what the open update's ticks use instead

    def submit(self, batch: Mapping[str, Any], context: Any = None) -> int:
        """Forward and backward of a micro-batch with the weights of now; its gradients are queued."""
        segment = self._streams.enter(batch) if self.partition.remembers else None
        if self.settings.predicts and not self.update_open:
            self._predict()
        tick, self._tick = self._tick, self._tick + 1
        delayed = not self.settings.is_synchronous(self._update)
        if delayed and self._delay_start is None:
            self._delay_start = tick
        with own_threads(self.settings.threads, self._device), self._predicted_weights():
            loss = self._compute(tick, batch, context, segment, delayed)
        self._finished.append(FinishedLoss(tick, loss.detach()))
        return tick

    def _compute(
        self, tick: int, batch: Mapping[str, Any], context: Any, segment: Segment | None, delayed: bool
    ) -> torch.Tensor:
        """The loss of a micro-batch, whose gradients are queued."""
        leaves = self._leaves()
        loss, output_side = self._forward(tick, batch, context, segment, leaves, split_tied=delayed)
        self._backward(loss, tick)
        self._output_side[tick] = {name: head.grad for name, head in output_side.items() if head.grad is not None}
        for k in range(len(self._owned)):
            self._queues[k][tick] = self._taken(k, leaves)
        return loss

    def _taken(self, k: int, leaves: Mapping[int, torch.Tensor]) -> Gradients:
        """The gradients that a backward has left in a stage's leaves, taken out of them."""
        found = {name: leaves[id(p)] for name, p in self._owned[k].items() if leaves[id(p)].grad is not None}
        gradients = {name: leaf.grad for name, leaf in found.items() if leaf.grad is not None}
        for leaf in found.values():
            leaf.grad = None
        return gradients

    def _predict(self) -> None:
        """What the ticks of the update that opens now use instead of the real weights."""
        hyperparameters, self._predicted = snapshot_hyperparameters(self.optimizer), {}
        with own_threads(self.settings.threads, self._device):
            for k, owned in enumerate(self._owned):
                at = self.settings.stage_update(k, len(self._owned), self._update)
                ids = {id(p) for p in owned.values()}
                self._predicted |= predictions(self.optimizer, hyperparameters, ids, self.settings.compensations, at)

    @contextmanager
    def _predicted_weights(self) -> Iterator[None]:
        real = {p: p.data for owned in self._owned for p in owned.values() if id(p) in self._predicted}
        try:
            for parameter in real:
                parameter.data = self._predicted[id(parameter)]
            yield
        finally:
            for parameter, weights in real.items():
                parameter.data = weights

    def _leaves(self) -> dict[int, torch.Tensor]:
        """What the gradients of a tick are taken of, by the id of the parameter; a single stage uses the parameters."""
        parameters = [p for owned in self._owned for p in owned.values()]
        if self._alone:
            return {id(p): p for p in parameters}
        # What is frozen and of a kind of its own (a packed matrix) is more than its values.
        kept = {id(p): p for p in parameters if not p.requires_grad and type(p) is not torch.nn.Parameter}
        return {id(p): p.detach().requires_grad_(p.requires_grad) for p in parameters} | kept

    def _backward(self, loss: torch.Tensor, tick: int) -> None:
        with ExitStack() as scopes:
            if self._alone:
                scopes.enter_context(silenced(self._owned[0].values()))
            if self._watches_backward(tick):
                scopes.enter_context(NoDraws())
            loss.backward(self._one(loss))

    def _one(self, loss: torch.Tensor) -> torch.Tensor | None:
        """The gradient of the loss itself, with which a backward begins; None for one."""
        return None

    def _watches_backward(self, tick: int) -> bool:
        """Whether a backward is watched for random numbers that are drawn in it."""
        early = tick < self.settings.micro_batches
        return early or any(calls_backward_hooks(s.modules()) for s in self.partition.stages)

    def _forward(
        self,
        tick: int,
        batch: Mapping[str, Any],
        context: Any,
        segment: Segment | None,
        leaves: Mapping[int, torch.Tensor],
        split_tied: bool,
    ) -> tuple[torch.Tensor, Gradients]:
        """The loss, and with tied_gradient="paper" the separate leaves that the head used."""
        state: Boundary | torch.Tensor | None = None
        heads: Gradients = {}
        for k, stage in enumerate(self.partition.stages):
            stage.train()
            source = leaves
            if stage.is_last and k > 0 and split_tied and self.settings.tied_gradient == "paper":
                tied = self.partition.tied
                heads = {name: p.detach().requires_grad_(p.requires_grad) for name, p in tied.items()}
                source = {**leaves, **{id(p): heads[name] for name, p in tied.items()}}
            replaced = {name: source.get(id(p), p) for name, p in parameter_places(stage)}  # some are frozen copies
            check = None
            if not self._alone:  # the last stage may end in its own weights and in what it has received
                received, own = nodes_of(state), list(replaced.values())
                check = partial(self._check_loss, received, own)
            rehearse(
                stage,
                self._noise[k],
                self._reads[k],
                partial(self._rehearsal, k, tick, batch, replaced, state, segment),
            )
            with self._computing(k, tick, replaced):
                inputs, memory = select(stage, batch, self._device), self._memories[k].recall(segment)
                finish = None
                if stage.is_last:
                    given = batch, inputs, context, self._device
                    finish = finishing(self._loss_fn, *given, check, self._reads[k])
                output = functional_call(stage, replaced, (inputs, state, memory, finish), tie_weights=False)
                self._memories[k].keep(segment, memory)
                if not self._alone:
                    outputs = [output] if stage.is_last else output.values()
                    self._checks[k].forward(outputs, [*leaves.values(), *heads.values()])
            state = output
        assert isinstance(state, torch.Tensor)  # the loss, of the last stage
        return state, heads

    @contextmanager
    def _computing(self, k: int, tick: int, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Surrounds a forward of a stage: what it reads and draws, and its precision."""
        with ExitStack() as scopes:
            scopes.enter_context(self._reads[k].forward(weights))
            scopes.enter_context(self._noise[k].scope(self._seed, tick, self._device))
            if self.settings.autocast_dtype is not None:
                scopes.enter_context(torch.autocast(self._device.type, dtype=self.settings.autocast_dtype))
            yield

    def _rehearsal(
        self,
        k: int,
        tick: int,
        batch: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        state: Any,
        segment: Segment | None,
    ) -> None:
        """A forward of a stage, without the loss, of which nothing is kept."""
        stage = self.partition.stages[k]
        with self._computing(k, tick, weights):
            arguments = select(stage, batch, self._device), state, self._memories[k].recall(segment), None
            functional_call(stage, dict(weights), arguments, tie_weights=False)

    def _check_loss(self, received: set[Any], own: list[torch.Tensor], loss: torch.Tensor, outputs: set[Any]) -> None:
        self._checks[-1].loss(loss, received | outputs, own)

    def expose_gradients(self) -> None:
        """Puts the open update's gradients, the sum of each stage's window, clipped, into `grad` of the parameters.

        There scripts may look at them and change them until `step`, after which they stay until `clear_gradients`.
        """
        if not self._exposed:
            self._exposed = True
            self._sum_and_clip()

    def clear_gradients(self) -> None:
        """Removes gradients from the parameters."""
        self._exposed = False
        for owned in self._owned:
            for parameter in owned.values():
                parameter.grad = None

    def _sum_and_clip(self) -> None:
        with own_threads(self.settings.threads, self._device):
            for k in range(len(self._owned)):
                self._sum_window(k)
            self._clip()

    def step(self) -> int:
        """Applies to every stage the sum of its window, clipped, or leaves it alone if the window is empty."""
        if not self.update_open:
            raise EngineError("step() without a micro-batch since the last step()")
        if not self._exposed:
            self._sum_and_clip()
        gradients = [(p, p.grad) for owned in self._owned for p in owned.values() if p.grad is not None]
        with own_threads(self.settings.threads, self._device):
            if self.settings.compensations:
                self._compensated_step()
            elif gradients or not self.settings.scales_losses:
                self.optimizer.step()
        if self._exposed:
            for parameter, gradient in gradients:
                parameter.grad = gradient
        else:
            self.clear_gradients()
        self._first_tick, self._update = self._tick, self._update + 1
        return self._update - 1

    def _sum_window(self, k: int) -> None:
        delay = 0 if self.settings.is_synchronous(self._update) else len(self._owned) - 1 - k
        for tick in range(self._first_tick, self._tick):
            if k == 0:
                for name, gradient in self._output_side.pop(tick).items():
                    self._owned[0][name].grad = _sum(self._owned[0][name], gradient)
            for name, gradient in self._queues[k].pop(tick - delay, {}).items():
                parameter = self._owned[k][name]
                gradient = hooked(parameter, gradient, self._seed, k, tick - delay, name)
                parameter.grad = accumulated(parameter, _sum(parameter, gradient))

    def _clip(self) -> None:
        """Bounds each stage's norm by max_grad_norm/sqrt(K), or the norm of the whole by max_grad_norm."""
        stages = [[p for p in owned.values() if p.grad is not None] for owned in self._owned]
        stages = [parameters for parameters in stages if parameters]
        norms = [get_total_norm([p.grad for p in parameters if p.grad is not None]) for parameters in stages]
        finished = FinishedNorm(self._update, tuple(norms))
        self._norms.append(finished)
        self.grad_norm = finished.value
        if self.settings.max_grad_norm is None or not norms:
            return
        whole = torch.linalg.vector_norm(torch.stack(norms))
        for parameters, norm in zip(stages, norms, strict=True):
            if self.settings.clip_scope == "global":
                clip_grads_with_norm_(parameters, self.settings.max_grad_norm, whole)
            else:
                bound = self.settings.stage_norm_bound(len(self._owned))
                clip_grads_with_norm_(parameters, bound, norm)

    def _compensated_step(self) -> None:
        """Steps stage by stage: the optimizer leaves parameters without gradient alone, so the order is of no matter."""
        stages = [[(p, p.grad) for p in owned.values() if p.grad is not None] for owned in self._owned]
        for owned in self._owned:
            for parameter in owned.values():
                parameter.grad = None
        for k, gradients in enumerate(stages):
            if gradients:
                at = self.settings.stage_update(k, len(stages), self._update)
                compensated_step(self.optimizer, gradients, self.settings.compensations, at)


def _sum(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient that a parameter has with another one added."""
    return gradient if parameter.grad is None else parameter.grad + gradient
