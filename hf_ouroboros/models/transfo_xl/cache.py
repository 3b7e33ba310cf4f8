"""The cache for generation: projected keys, values and positions, so that a token costs no work on the memory."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from .configuration_transfo_xl import TransfoXLConfig

# Positions are projected this many distances at a time, and this many tokens fit in before memory is moved.
BLOCK = 128


class MemoryCacheLayer(CacheLayerMixin):
    """Keys and values of one layer's last mem_len rows, and all projected distances up to the largest one used.

    Rows are appended to buffers with some room. When the room is used up, the rows still needed move to the front of
    new buffers; that happens once in many tokens, where concatenating would copy the memory for every one.

        buffer   [ forgotten | last mem_len rows | new rows | room ]
                             ^ start                        ^ end

    Args:
        mem_len: rows that are kept.
    """

    is_compileable = False

    def __init__(self, mem_len: int):
        super().__init__()
        self.mem_len = mem_len
        self.start = self.end = 0
        self._relative: torch.Tensor | None = None

    @property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, once they are there."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes buffers for keys and values, [batch, n_head, room, d_head], that hold what is still needed."""
        kept = self.end - self.start
        room = kept + key_states.shape[2] + max(BLOCK, self.mem_len // 2)
        keys = key_states.new_empty(*key_states.shape[:2], room, key_states.shape[3])
        values = torch.empty_like(keys)
        if kept:
            for new, old in zip((keys, values), self._buffers, strict=True):
                new[:, :, :kept] = old[:, :, self.start : self.end]
        self.keys, self.values = keys, values
        self.start, self.end = 0, kept
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values, [batch, n_head, time, d_head]; returns the kept and the new ones.

        Gradient flows to the new ones only.
        """
        new = key_states.shape[2]
        if self.keys is None or self.end + new > self.keys.shape[2]:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._buffers
        begin, middle = self.start, self.end
        self.end += new
        keys[:, :, middle : self.end] = key_states.detach()
        values[:, :, middle : self.end] = value_states.detach()
        self.start = max(begin, self.end - self.mem_len)
        if torch.is_grad_enabled():
            # Views of the buffers would be overwritten under a pending backward.
            keys = torch.cat([keys[:, :, begin:middle], key_states], 2)
            return keys, torch.cat([values[:, :, begin:middle], value_states], 2)
        return keys[:, :, begin : self.end], values[:, :, begin : self.end]

    def relative_keys(self, count: int, project: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """Projected distances count-1 .. 0, [n_head, count, d_head]; project(far, near) gives far-1 .. near."""
        if torch.is_grad_enabled():
            return project(count, 0)  # what is kept has no gradient
        relative = self._relative
        known = 0 if relative is None else relative.shape[1]
        if relative is None or count > known:
            further = project(math.ceil(count / BLOCK) * BLOCK, known)
            relative = self._relative = further if relative is None else torch.cat([further, relative], 1)
        return relative[:, relative.shape[1] - count :]

    def get_seq_length(self) -> int:
        """Rows that are kept."""
        return self.end - self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys and offset of the first one, as transformers' mask utilities want them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Rows that can be kept."""
        return self.mem_len

    def get_max_cache_shape(self) -> int:
        """The same, as early 5.x releases call it."""
        return self.mem_len

    def reset(self) -> None:
        """Forgets keys and values; projected distances stay valid."""
        self.start = self.end = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Selects the samples of the surviving beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these samples, in this order."""
        if self.get_seq_length():
            kept = slice(self.start, self.end)
            keys, values = (states[:, :, kept].index_select(0, indices) for states in self._buffers)
            self.keys, self.values, self.start, self.end = keys, values, 0, keys.shape[2]


CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What transformers calls a cache in arguments and outputs: "cache" since 5.24."""


class TransfoXLCache(Cache):
    """`cache` of a Transformer-XL: memory in projected form, for inference; for training carry `mems`.

    Args:
        config: the model's.
    """

    def __init__(self, config: TransfoXLConfig):
        super().__init__(layers=[MemoryCacheLayer(config.mem_len) for _ in range(config.n_layer)])
        self.mem_len = config.mem_len
        self.valid: torch.Tensor | None = None
        self.seen_tokens = 0

    @property
    def rows(self) -> int:
        """Rows of memory that are kept, equal in all layers."""
        return cast(MemoryCacheLayer, self.layers[0]).get_seq_length()

    def record(self, time: int, valid: torch.Tensor | None) -> None:
        """Notes a segment of `time` tokens and which of all keys hold tokens, bool [batch, keys] or None for all."""
        self.seen_tokens += time
        self.valid = None if valid is None else valid[:, max(0, valid.shape[1] - self.mem_len) :]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, forgotten ones included: `generate` finds the new ones of a longer input by it."""
        return self.seen_tokens

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.valid, self.seen_tokens = None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Selects the samples of the surviving beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these samples, in this order."""
        super().batch_select_indices(indices)
        self.valid = None if self.valid is None else self.valid.index_select(0, indices)
