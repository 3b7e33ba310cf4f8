"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .cache import TransfoXLCache
from .memory import TransfoXLMemory


@dataclass
class TransfoXLModelOutput(ModelOutput):
    """Output of the base model.

    Args:
        last_hidden_state: [batch, time, d_model].
        mems: memory for the next segment; None with a cache, with `use_cache=False`, or if mem_len is 0.
        past_key_values: the cache, with `use_cache=True`.
        hidden_states: inputs of all layers and the last hidden state, [batch, time, d_model] each.
        attentions: attention probabilities of all layers, [batch, n_head, time, keys] each.
    """

    last_hidden_state: torch.Tensor | None = None
    mems: TransfoXLMemory | None = None
    past_key_values: TransfoXLCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class TransfoXLLMHeadModelOutput(ModelOutput):
    """Output of the language model; what isn't said here is as in TransfoXLModelOutput.

    Args:
        loss: scalar, with labels: mean over the labels that count, in nats.
        logits: log-probabilities [batch, time, vocab_size], normalised.
        losses: with labels: loss of every position, [batch, time-1] ([batch, time] with shift_labels), 0 where ignored.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    mems: TransfoXLMemory | None = None
    past_key_values: TransfoXLCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def prediction_scores(self) -> torch.Tensor | None:
        """`logits`, as transformers 4 called them."""
        return self.logits
