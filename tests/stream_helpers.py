"""A tiny Transformer-XL that reads streams: the cases of `helpers`, with memories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import VOCABULARY, Batch, Case

from hf_ouroboros.engine.losses import LossOfModel
from hf_ouroboros.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel

TIME = 5
CUT = {"cutoffs": [6, 13], "div_val": 4, "d_embed": 16}
CUT_ONE_TABLE = {"cutoffs": [6, 13], "d_embed": 6}


def tiny_xl(dropout: float = 0.0, layers: int = 5, **config: Any) -> TransfoXLLMHeadModel:
    """A Transformer-XL of a few thousand parameters, always with the same weights."""
    values: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        cutoffs=[],
        div_val=1,
        d_model=8,
        d_embed=8,
        n_head=2,
        d_head=4,
        d_inner=12,
        n_layer=layers,
        mem_len=7,
        clamp_len=-1,
        same_length=False,
        dropout=dropout,
        dropatt=dropout,
        init_std=0.2,
        proj_init_std=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TransfoXLLMHeadModel(TransfoXLConfig(**{**values, **config}))


def stream_batch(group: int, rows: int, segment: int, seed: int = 0, time: int = TIME) -> Batch:
    """One segment of consecutive columns of random tokens, labels as a stream's collator gives them."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * segment + group)
    ids = torch.randint(VOCABULARY, (rows, time + 1), generator=generator)
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, :-1],
        "shift_labels": ids[:, 1:],
        "stream_columns": torch.arange(group, group + rows),
        "stream_segments": torch.full((rows,), segment),
    }


class StreamLoss(LossOfModel):
    """Sum of the losses of a micro-batch over the targets of its update.

    Args:
        replicas: whose mean it becomes.
    """

    def __init__(self, replicas: int = 1):
        self.replicas = replicas

    def __call__(self, model: Any, inputs: dict[str, Any], context: Any) -> torch.Tensor:
        given = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
        output = model(**given, shift_labels=inputs["shift_labels"], num_items_in_batch=context)
        assert output.logits is None, "the head computes the loss"
        return output.loss * self.replicas


@dataclass(frozen=True)
class StreamCase(Case):
    """A run of a Transformer-XL over a stream.

    Args:
        groups: how many micro-batches, of different columns, read a segment.
        epoch: segments of an epoch.
        config: of the model.
    """

    groups: int = 1
    epoch: int = 100
    rows: int = 2
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def model(self) -> TransfoXLLMHeadModel:
        return tiny_xl(self.dropout, self.layers, **{"tie_word_embeddings": self.tied, **self.config})

    def loss(self, replicas: int = 1) -> StreamLoss:
        return StreamLoss(replicas)

    def targets(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> int:
        return sum(batch["shift_labels"].numel() for batch in batches)

    def batches(self, update: int) -> list[Batch]:
        first = sum(self.updates[:update])
        return [self.batch(tick) for tick in range(first, first + self.updates[update])]

    def batch(self, tick: int) -> Batch:
        """The micro-batch of a tick: all groups of a segment before the next segment."""
        segment, group = divmod(tick, self.groups)
        epoch, segment = divmod(segment, self.epoch)
        return stream_batch(group * self.rows, self.rows, segment, seed=epoch)
