"""Contenders of torch.distributed.pipelining: GPipe, 1F1B, and zero-bubble in three forms, over our stages.

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
from torch.distributed.pipelining import PipelineStage
from torch.nn.functional import cross_entropy

from hf_ouroboros import split_model
from hf_ouroboros.partition import Stage
from hf_ouroboros.partition.anatomy import HIDDEN

from .contenders import ContenderError
from .job import Job, build_model, muon_matrices, tables
from .loop import Peer
from .pipelines import PIPELINES


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


class Pipelined(Peer):
    """This process's stages, their optimizer, and the schedule that runs them."""

    def __init__(self, job: Job, world_size: int):
        super().__init__(job, world_size)
        pipeline = PIPELINES[job.contender.kind]
        self.placement = pipeline.placement(world_size)
        self.num_stages, self.knows_losses = len(self.placement), self.placement[-1]
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
        own = [s for s, device in enumerate(self.placement) if device == self.rank]
        self.parts = {s: Part(all_stages[s]).to(self.device).train() for s in own}
        self.owns_first, self.owns_last = 0 in self.parts, self.num_stages - 1 in self.parts
        self.copies: list[nn.Parameter] = []
        self.copies_group = None
        if tied:
            self.copies_group = dist.new_group(sorted({self.placement[0], self.placement[-1]}))
            if self.owns_first:
                self.copies.append(inputs.weight)
            if self.owns_last:
                self.copies.append(outputs.weight)
        self.counted_twice = {id(outputs.weight)} if tied else set()
        self.stages = [TimedStage(part, s, self.num_stages, self.device) for s, part in self.parts.items()]
        self.schedule = pipeline.schedule_class(
            self.stages if pipeline.stages_per_device > 1 else self.stages[0],
            job.contender.micro_batches,
            loss_fn=next_token_loss,
        )
        # torch 2.9 has no choice and keeps the logits of all micro-batches.
        has_choice = "return_outputs" in inspect.signature(self.schedule.step).parameters
        self.step_options = {"return_outputs": False} if has_choice else {}
        self.parameters = [p for part in self.parts.values() for p in part.parameters()]
        self.optimizer, self.lr_scheduler = self.make_optimizer(self.parameters, model, matrices)
        self.width = model.config.get_text_config().hidden_size
        self.optimizer_seconds = 0.0

    def update(self, ids: torch.Tensor) -> float | None:
        """See `Peer.update`; the last stage's process knows the loss."""
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
        """See `Peer.busy_seconds`."""
        return self.optimizer_seconds + sum(stage.busy for stage in self.stages)

    def _sum_copies(self) -> None:
        if len(self.copies) == 2:  # on one device
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
        """See `Peer.evaluate`: forward from stage to stage."""
        losses, hidden = [], None
        for ids in rows.split(self.job.rows_per_micro_batch):
            for s, owner in enumerate(self.placement):
                before = self.placement[s - 1] if s > 0 else owner
                if owner != before:
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
        dist.broadcast(mean, self.knows_losses)
        return mean.item()
