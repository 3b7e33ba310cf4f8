"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .cache import CACHE_NAME, TransfoXLCache
from .recurrent_memory import TransfoXLMemory


def _output(kind: type) -> type:
    """A dataclass whose `cache` has the name that this release of transformers looks for in outputs."""
    if CACHE_NAME != "cache":
        kind.__annotations__ = {CACHE_NAME if n == "cache" else n: t for n, t in kind.__annotations__.items()}
        setattr(kind, CACHE_NAME, None)
        type.__setattr__(kind, "cache", property(lambda output: getattr(output, CACHE_NAME)))
    return dataclass(kind)


@_output
class TransfoXLModelOutput(ModelOutput):
    """Output of the base model.

    Args:
        last_hidden_state: [batch, time, d_model].
        mems: memory for the next segment; None with a cache, with `use_cache=False`, or if mem_len is 0.
        cache: the cache, with `use_cache=True`; `past_key_values` is another name for it.
        hidden_states: inputs of all layers and the last hidden state, [batch, time, d_model] each.
        attentions: attention probabilities of all layers, [batch, n_head, time, keys] each.
    """

    last_hidden_state: torch.Tensor | None = None
    mems: TransfoXLMemory | None = None
    cache: TransfoXLCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@_output
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
    cache: TransfoXLCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def prediction_scores(self) -> torch.Tensor | None:
        """`logits`, as transformers 4 called them."""
        return self.logits
