"""Contenders of torch.distributed.pipelining: GPipe, 1F1B and interleaved zero-bubble over our stages.

The stages come from our own partition, so that all contenders are split equally well. Those schedules can't share a
matrix between the first and the last stage; as Megatron-LM does, each of the two keeps a copy and their gradients are
summed in every update, so that the copies stay one matrix and the numbers are those of the tied model.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleavedZeroBubble
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, get_scheduler

from hf_ouroboros import split_model
from hf_ouroboros.partition import Stage
from hf_ouroboros.partition.anatomy import HIDDEN

from .clock import Clock
from .contenders import ContenderError
from .job import Job, build_model, common_arguments, muon, muon_matrices, tables
from .measure import gather, peak_memory_mib, steady_state
from .options import settling_updates
from .text import read_blocks
from .trainers import arguments_of

SCHEDULES = {"torch-gpipe": ScheduleGPipe, "torch-1f1b": Schedule1F1B, "torch-zb": ScheduleInterleavedZeroBubble}
STAGES_PER_DEVICE = {"torch-zb": 2}


class Part(nn.Module):
    """A stage as torch.distributed.pipelining calls it: with token ids, or with the hidden state before."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage = stage

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, time] or hidden [batch, time, width] -> hidden or logits [batch, time, vocabulary]."""
        if self.stage.is_first:
            output = self.stage({"input_ids": inputs})
        else:  # only the shape of the tokens matters to layers and head
            tokens = torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)
            output = self.stage({"input_ids": tokens}, {HIDDEN: inputs})
        return output if self.stage.is_last else output[HIDDEN]


def check_boundaries(stages: Sequence[Stage]) -> None:
    """Refuses a model whose layers get more than the hidden state, which is all that these schedules hand on.

    Raises:
        ContenderError: it is one.
    """
    ids, state = torch.zeros(1, 4, dtype=torch.long), None
    with torch.no_grad():
        for stage in stages[:-1]:
            state = stage({"input_ids": ids}, state)
            if more := sorted(state.keys() - {HIDDEN}):
                raise ContenderError(
                    f"{type(stage.config).__name__}: {len(more)} tensor(s) besides the hidden state cross the end of stage "
                    f"{stage.index}, but torch-* hand on one; leave torch-* out for this --model_type"
                )


class TimedStage(PipelineStage):
    """A stage that adds up how long it computes; on accelerators, which compute later than they are told, it does not."""

    busy = 0.0

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of a micro-batch."""
        return self._timed(super().forward_one_chunk, *args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Backward of a micro-batch, of all or of the input's side only."""
        return self._timed(super().backward_one_chunk, *args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """The weights' side of a backward."""
        return self._timed(super().backward_weight_one_chunk, *args, **kwargs)

    def _timed(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            self.busy += time.perf_counter() - start


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of [batch, time, vocabulary] against the ids [batch, time] one place further."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


class Peer:
    """This process's stages, their optimizer, and the schedule that runs them."""

    def __init__(self, job: Job, world_size: int):
        self.job, self.rank, self.world_size = job, dist.get_rank(), world_size
        kind, micro_batches = job.contender.kind, job.contender.micro_batches
        self.device = torch.device("cpu") if job.options.on_cpu else torch.device(job.options.devices[self.rank])
        self.num_stages = world_size * STAGES_PER_DEVICE.get(kind, 1)
        model = build_model(job)
        matrices = muon_matrices(model) if job.options.optimizer == "muon" else []
        inputs, outputs = tables(model)
        tied = outputs.weight is inputs.weight
        if tied:
            outputs.weight = nn.Parameter(inputs.weight.detach().clone())
            model.config.tie_word_embeddings = False
        names = [f"cpu:{i}" for i in range(self.num_stages)]  # only a split: no weight moves
        all_stages = split_model(model, names, num_stages=self.num_stages, check=False).stages
        check_boundaries(all_stages)
        self.parts = {
            s: Part(all_stages[s]).to(self.device).train() for s in range(self.rank, self.num_stages, world_size)
        }
        self.owns_first, self.owns_last = 0 in self.parts, self.num_stages - 1 in self.parts
        self.copies: list[nn.Parameter] = []
        self.copies_group = None
        if tied:
            self.copies_group = dist.new_group(sorted({0, world_size - 1}))
            if self.owns_first:
                self.copies.append(inputs.weight)
            if self.owns_last:
                self.copies.append(outputs.weight)
        self.counted_twice = {id(outputs.weight)} if tied else set()
        self.stages = [TimedStage(part, s, self.num_stages, self.device) for s, part in self.parts.items()]
        self.schedule = SCHEDULES[kind](
            self.stages if kind in STAGES_PER_DEVICE else self.stages[0], micro_batches, loss_fn=next_token_loss
        )
        # torch 2.9 has no choice and keeps the logits of all micro-batches.
        has_choice = "return_outputs" in inspect.signature(self.schedule.step).parameters
        self.step_options = {"return_outputs": False} if has_choice else {}
        self.arguments = arguments_of(TrainingArguments, common_arguments(job), job.contender.settings)
        self.parameters = [p for part in self.parts.values() for p in part.parameters()]
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(self.arguments)
        if job.options.optimizer == "muon":
            optimizer_class, options = muon(self.arguments, model, matrices)
        # As Trainer does: biases and norms don't decay.
        groups = [
            {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": self.arguments.weight_decay},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = optimizer_class(groups, **options)
        self.lr_scheduler = get_scheduler(
            self.arguments.lr_scheduler_type, self.optimizer, self.arguments.warmup_steps, job.updates
        )
        self.width = model.config.get_text_config().hidden_size
        self.optimizer_seconds = 0.0

    def update(self, ids: torch.Tensor) -> float | None:
        """One optimizer step on a global batch [rows, time]; the mean loss where the last stage is."""
        ids = ids.to(self.device).long()
        losses: list[torch.Tensor] = []
        inputs = (ids,) if self.owns_first else ()
        labels = {"target": ids, "losses": losses} if self.owns_last else {}
        self.schedule.step(*inputs, **labels, **self.step_options)
        start = time.perf_counter()
        self._sum_copies()
        self._clip()
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.optimizer_seconds += time.perf_counter() - start
        return torch.stack(losses).mean().item() if self.owns_last else None

    def busy_seconds(self) -> float:
        """How long this process has computed so far."""
        return self.optimizer_seconds + sum(stage.busy for stage in self.stages)

    def _sum_copies(self) -> None:
        if len(self.copies) == 2:  # a single device
            self.copies[0].grad += self.copies[1].grad
            self.copies[1].grad.copy_(self.copies[0].grad)
        elif self.copies:
            dist.all_reduce(self.copies[0].grad, group=self.copies_group)

    def _clip(self) -> None:
        """Limits the norm of the whole model's gradient, as the stock Trainer does."""
        if not self.arguments.max_grad_norm:
            return
        once = [p.grad for p in self.parameters if id(p) not in self.counted_twice]
        squares = torch.nn.utils.get_total_norm(once).square()
        dist.all_reduce(squares)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.arguments.max_grad_norm, squares.sqrt())

    @torch.no_grad()
    def evaluate(self, rows: torch.Tensor) -> float:
        """Mean loss over rows [rows, time], the same in all processes: forward from stage to stage."""
        losses, hidden = [], None
        for ids in rows.split(self.job.rows_per_micro_batch):
            ids = ids.to(self.device).long()
            for s in range(self.num_stages):
                owner, before = s % self.world_size, (s - 1) % self.world_size
                if s > 0 and owner != before:
                    if self.rank == before:
                        dist.send(hidden, owner)
                    elif self.rank == owner:
                        hidden = torch.empty(*ids.shape, self.width, device=self.device)
                        dist.recv(hidden, before)
                if self.rank == owner:
                    hidden = self.parts[s](ids if s == 0 else hidden)
            if self.owns_last:
                losses.append(next_token_loss(hidden, ids))
        mean = torch.stack(losses).mean() if self.owns_last else torch.zeros((), device=self.device)
        dist.broadcast(mean, (self.num_stages - 1) % self.world_size)
        return mean.item()


def run(job: Job, world_size: int) -> dict[str, Any]:
    """Trains; returns the measurements, equal in all processes."""
    train, validation = read_blocks(job)
    peer, clock, losses, busy = Peer(job, world_size), Clock(), [], []
    clock.restart()
    for update, ids in enumerate(train.split(job.options.global_batch), start=1):
        losses.append(peer.update(ids))
        if not job.options.on_cpu:
            torch.cuda.synchronize()
        clock.update_ended()
        busy.append(peer.busy_seconds())
        if job.evaluate and update % job.options.eval_every == 0:
            with clock.paused():
                loss = peer.evaluate(validation)
            clock.evaluations.append((update, clock.now(), loss))
            if job.target is not None and loss <= job.target:
                break
    losses = gather(losses)[(peer.num_stages - 1) % world_size]
    result = steady_state(job, clock) | {
        "training_loss": sum(losses) / len(losses),
        "losses": losses,
        "peak_memory_mib": peak_memory_mib(None),
    }
    if not job.evaluate:
        result["eval_loss"] = peer.evaluate(validation)
        if job.options.on_cpu:
            first, last = settling_updates(job.contender), len(busy) - 2
            result["busy_shares"] = gather((busy[last] - busy[first]) / (clock.times[last] - clock.times[first]))
    return result
