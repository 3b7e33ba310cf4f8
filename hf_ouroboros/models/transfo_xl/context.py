"""What all layers of a forward pass share: relative positions, and who may attend to whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .configuration_transfo_xl import TransfoXLConfig


@dataclass
class AttentionContext:
    """Arguments of every layer; each pipeline stage builds its own.

    Args:
        hidden_keys: bool [batch or 1, 1, time, keys]: True where a query must not see a key.
        positions: encoded distances keys-1 .. 0, [keys, d_model]; None if a cache holds the projected ones.
        r_w_bias: content bias that all layers share, [n_head, d_head]; None if each layer has its own.
        r_r_bias: the same for positions.
        output_attentions: whether layers return their attention probabilities.
    """

    hidden_keys: torch.Tensor
    positions: torch.Tensor | None
    r_w_bias: torch.Tensor | None = None
    r_r_bias: torch.Tensor | None = None
    output_attentions: bool = False


def attention_context(
    config: TransfoXLConfig,
    hidden: torch.Tensor,
    memory_rows: int,
    valid: torch.Tensor | None = None,
    shared_biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    training: bool = False,
    cached: bool = False,
    output_attentions: bool = False,
) -> AttentionContext:
    """The context of a segment.

    Args:
        config: the model's.
        hidden: hidden state of the segment, [batch, time, d_model]; only its shape, dtype and device matter.
        memory_rows: rows of memory (or cache) before the segment.
        valid: bool [batch, memory_rows + time], see `valid_keys`; None if every key may be attended to.
        shared_biases: r_w_bias and r_r_bias of the model, if `untie_r` is False.
        training: whether dropout acts on the positions.
        cached: whether a cache holds the projected positions.
        output_attentions: whether layers return their attention probabilities.
    """
    time = hidden.shape[1]
    keys = memory_rows + time
    positions = None
    if not cached:
        positions = relative_positions(config, keys, 0, hidden.device).to(hidden.dtype)
        positions = F.dropout(positions, config.dropout, training)
    r_w_bias, r_r_bias = shared_biases or (None, None)
    window = config.mem_len if config.same_length else 0
    hidden_keys = _hidden_keys(time, keys, window, valid, hidden.device)
    return AttentionContext(hidden_keys, positions, r_w_bias, r_r_bias, output_attentions)


def valid_keys(
    hidden: torch.Tensor, memory_rows: int, memory_valid: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Which keys hold tokens: bool [batch, memory_rows + time]; None if all do.

    Args:
        hidden: hidden state of the segment, [batch, time, d_model].
        memory_rows: rows of memory before the segment.
        memory_valid: bool [batch, memory_rows]; None if all rows are valid.
        attention_mask: [batch, at least time], 0 at padding; only the last `time` columns, those of the segment,
            count. None without padding.

    Raises:
        ValueError: the attention mask doesn't cover the segment.
    """
    if memory_valid is None and attention_mask is None:
        return None
    batch, time = hidden.shape[:2]
    if attention_mask is None:
        attention_mask = hidden.new_ones(batch, time, dtype=torch.bool)
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < time:
        raise ValueError(
            f"attention_mask must have shape [batch={batch}, at least time={time}], 0 at padding; "
            f"found {tuple(attention_mask.shape)}"
        )
    if memory_valid is None:
        memory_valid = hidden.new_ones(batch, memory_rows, dtype=torch.bool)
    return torch.cat([memory_valid, attention_mask[:, -time:].bool()], 1)


def relative_positions(config: TransfoXLConfig, far: int, near: int, device: torch.device) -> torch.Tensor:
    """Encoded distances far-1 .. near: sines, then cosines, [far - near, d_model] (Dai et al. 2019, section 3.3).

    Always float32, also under autocast: bfloat16 can't tell large distances apart.
    """
    distances = torch.arange(far - 1, near - 1, -1, dtype=torch.float32, device=device)
    if config.clamp_len > 0:
        distances = distances.clamp(max=config.clamp_len)
    channels = torch.arange(0, config.d_model, 2, dtype=torch.float32, device=device)
    # A product of broadcast tensors: autocast would compute an outer product or matmul in bfloat16.
    angles = distances[:, None] * (1 / 10000 ** (channels / config.d_model))
    return torch.cat([angles.sin(), angles.cos()], -1)


def _hidden_keys(time: int, keys: int, window: int, valid: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    queries = torch.arange(keys - time, keys, device=device)
    distance = queries[:, None] - torch.arange(keys, device=device)
    hidden = distance < 0
    if window > 0:
        hidden = hidden | (distance >= window)
    if valid is not None:
        # A padding position sees at least itself: a query without any key would have no softmax.
        hidden = hidden | (~valid[:, None, :] & (distance != 0))
    return hidden[:, None] if hidden.dim() == 3 else hidden[None, None]
