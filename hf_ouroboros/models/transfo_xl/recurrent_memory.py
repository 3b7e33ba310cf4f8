"""Recurrent memory: the last inputs of every layer, and which of their rows hold tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .configuration_transfo_xl import TransfoXLConfig


@dataclass
class TransfoXLMemory:
    """What one segment leaves to the next (Dai et al. 2019, section 3.2): `model(ids, mems=outputs.mems)`.

    Behaves like the list of its `states`.

    Args:
        states: one tensor per layer: the layer's last inputs, [batch, rows, d_model], oldest first, without gradient.
        valid: bool [batch, rows]: False where a row holds no token (start of the text, padding) and isn't attended
            to; None if every row may be attended to.
    """

    states: tuple[torch.Tensor, ...]
    valid: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.states)

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.states[layer]

    @property
    def rows(self) -> int:
        """Number of rows, equal in all layers."""
        return self.states[0].shape[1]

    def to(self, *args: Any, **kwargs: Any) -> TransfoXLMemory:
        """A copy elsewhere, as `torch.Tensor.to`; `valid` keeps its dtype."""
        states = tuple(state.to(*args, **kwargs) for state in self.states)
        return TransfoXLMemory(states, None if self.valid is None else self.valid.to(states[0].device))

    def repeat_interleave(self, repeats: int) -> TransfoXLMemory:
        """Every sample `repeats` times, for beams."""
        states = tuple(state.repeat_interleave(repeats, 0) for state in self.states)
        return TransfoXLMemory(states, None if self.valid is None else self.valid.repeat_interleave(repeats, 0))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Selects the samples of the surviving beams, in place: `generate` treats `mems` as a cache too."""
        self.states = tuple(state.index_select(0, beam_idx) for state in self.states)
        self.valid = None if self.valid is None else self.valid.index_select(0, beam_idx)


def initial_memory(
    config: TransfoXLConfig, batch: int, num_layers: int, dtype: torch.dtype, device: torch.device
) -> TransfoXLMemory:
    """The memory of `num_layers` layers before the first segment: mem_len zero rows, valid if mem_init is "zeros"."""
    zeros = torch.zeros(batch, config.mem_len, config.d_model, dtype=dtype, device=device)
    valid = None
    if config.mem_init == "masked":
        valid = torch.zeros(batch, config.mem_len, dtype=torch.bool, device=device)
    return TransfoXLMemory((zeros,) * num_layers, valid)


def first_memory(
    config: TransfoXLConfig, batch: int, num_layers: int, dtype: torch.dtype, device: torch.device
) -> TransfoXLMemory:
    """As `initial_memory`, for a segment at the start of a text: masked rows change nothing and are left out."""
    memory = initial_memory(config, batch, num_layers, dtype, device)
    if memory.valid is not None:
        memory = TransfoXLMemory(tuple(state[:, :0] for state in memory), memory.valid[:, :0])
    return memory


def next_memory(
    memory: TransfoXLMemory, inputs: Sequence[torch.Tensor], valid: torch.Tensor | None, mem_len: int
) -> TransfoXLMemory:
    """The memory after a segment.

    Args:
        memory: before it.
        inputs: of each layer, [batch, time, d_model].
        valid: bool [batch, rows + time], see `valid_keys`; None if every key may be attended to.
        mem_len: rows to keep.
    """
    states = tuple(extended(old, new, mem_len) for old, new in zip(memory, inputs, strict=True))
    return TransfoXLMemory(states, None if valid is None else extended(valid[:, :0], valid, mem_len))


def checked_memory(
    mems: TransfoXLMemory | Sequence[torch.Tensor], config: TransfoXLConfig, batch: int
) -> TransfoXLMemory:
    """What a caller gave as `mems`; in a plain sequence of tensors every row counts as valid.

    Raises:
        ValueError: not one tensor [batch, rows, d_model] per layer.
    """
    memory = mems if isinstance(mems, TransfoXLMemory) else TransfoXLMemory(tuple(mems))
    expected = (batch, memory.rows, config.d_model) if memory.states else ()
    shapes = [tuple(state.shape) for state in memory]
    if len(memory) != config.n_layer or any(shape != expected for shape in shapes):
        raise ValueError(
            f"mems must hold {config.n_layer} tensors of shape [batch={batch}, rows, d_model={config.d_model}], one "
            f"per layer and batch first; found {len(memory)}: {sorted(set(shapes))}"
        )
    return memory


def extended(old: torch.Tensor, new: torch.Tensor, mem_len: int) -> torch.Tensor:
    """The last mem_len rows (dimension 1) of old and new together, without gradient; zeros in front if there are fewer.

    For the states of a layer, [batch, rows, d_model], and for `valid`, [batch, rows], alike.
    """
    rows = torch.cat([old, new.detach()], 1)[:, -mem_len:] if mem_len else new.detach()[:, :0]
    padding = (0, 0) * (rows.dim() - 2) + (mem_len - rows.shape[1], 0)
    return F.pad(rows, padding)
