"""Relative multi-head attention: content and position scores with learned biases (Dai et al. 2019, section 3.3).

    score(i, j) = ((q_i + r_w_bias) k_j + (q_i + r_r_bias) r_(i-j)) / sqrt(d_head)

k are keys of memory and segment, r_(i-j) is the projected encoding of the distance. The second term doesn't depend on
the softmax kernel, so it enters `scaled_dot_product_attention` as an additive mask: exact, and fused with the rest.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .cache import MemoryCacheLayer
from .configuration_transfo_xl import TransfoXLConfig
from .context import AttentionContext, relative_positions


class RelativeAttention(nn.Module):
    """Attention of a segment to its memory and itself, with residual connection and layer norm.

    Args:
        config: the model's; `_attn_implementation` chooses the kernel, "sdpa" or "eager".
    """

    def __init__(self, config: TransfoXLConfig):
        super().__init__()
        self.config = config
        inner = config.n_head * config.d_head
        self.qkv_net = nn.Linear(config.d_model, 3 * inner, bias=False)
        self.o_net = nn.Linear(inner, config.d_model, bias=False)
        self.r_net = nn.Linear(config.d_model, inner, bias=False)
        self.drop = nn.Dropout(config.dropout)
        self.drop_attention = nn.Dropout(config.dropatt)  # inside the kernel; a module, so that dropout is found
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        if config.untie_r:
            self.r_w_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))
            self.r_r_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))

    def forward(
        self,
        hidden: torch.Tensor,
        context: AttentionContext,
        memory: torch.Tensor | None = None,
        cache: MemoryCacheLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends to [memory or cache; hidden].

        Args:
            hidden: [batch, time, d_model].
            context: see AttentionContext.
            memory: [batch, rows, d_model] or None; not together with a cache that holds rows.
            cache: takes the new keys and values and gives the old ones.

        Returns:
            The next hidden state, [batch, time, d_model], and the attention probabilities [batch, n_head, time, keys]
            if the context asks for them.
        """
        q, k, v = self._heads(hidden, memory)
        if cache is not None:
            k, v = cache.update(k, v)
            r = cache.relative_keys(k.shape[2], lambda far, near: self._relative_keys(far, near, hidden))
        else:
            r = self._split(self.r_net(context.positions))
        if not self.config.untie_r:
            assert context.r_w_bias is not None and context.r_r_bias is not None  # the model has them
            r_w_bias, r_r_bias = context.r_w_bias, context.r_r_bias
        else:
            r_w_bias, r_r_bias = self.r_w_bias, self.r_r_bias
        scale = self.config.d_head**-0.5
        bias = _position_scores((q + r_r_bias[:, None]) * scale, r, context.hidden_keys)
        dropout = self.drop_attention.p if self.training else 0.0
        if self.config._attn_implementation == "eager" or context.output_attentions:
            output, probabilities = _eager(q + r_w_bias[:, None], k, v, bias, scale, dropout)
        else:
            output = F.scaled_dot_product_attention(
                q + r_w_bias[:, None], k, v, attn_mask=bias, dropout_p=dropout, scale=scale
            )
            probabilities = None
        output = self.drop(self.o_net(output.transpose(1, 2).flatten(2)))
        output = hidden + output if self.config.pre_lnorm else self.layer_norm(hidden + output)
        return output, probabilities if context.output_attentions else None

    def _heads(self, hidden: torch.Tensor, memory: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Queries of the segment, keys and values of memory and segment: [batch, n_head, time or keys, d_head]."""
        rows = hidden if memory is None else torch.cat([memory, hidden], 1)
        if self.config.pre_lnorm:
            rows = self.layer_norm(rows)
        inner = self.o_net.in_features
        # The memory needs no queries, so only a part of the weight is for all rows.
        q = F.linear(rows[:, rows.shape[1] - hidden.shape[1] :], self.qkv_net.weight[:inner])
        k, v = F.linear(rows, self.qkv_net.weight[inner:]).chunk(2, -1)
        return self._split(q), self._split(k), self._split(v)

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (self.config.n_head, self.config.d_head)).transpose(-3, -2)

    def _relative_keys(self, far: int, near: int, like: torch.Tensor) -> torch.Tensor:
        """Projected distances far-1 .. near, [n_head, far - near, d_head], as a cache keeps them."""
        return self._split(self.r_net(relative_positions(self.config, far, near, like.device).to(like.dtype)))


def _position_scores(q: torch.Tensor, r: torch.Tensor, hidden_keys: torch.Tensor) -> torch.Tensor:
    """Scores by distance, aligned with the keys, -inf where hidden: [batch, n_head, time, keys].

    Args:
        q: biased and scaled queries, [batch, n_head, time, d_head].
        r: projected distances keys-1 .. 0, [n_head, keys, d_head].
        hidden_keys: see AttentionContext.

    Query i of T finds key j at the distance (keys - T + i) - j, which is column j + T-1-i of q r': row i has to move left
    by T-1-i. With one more column in front, reading the same memory with rows that are one element shorter does just
    that, so the shift costs nothing (T = 2, 3 keys; x: the new column, [ ]: what the view skips):

        [x  a2] a1 a0
         x  b2  b1 b0      ->   (a1 a0 x)  (b2 b1 b0)       a0 is query 0 at distance 0; x is in its future, hidden
    """
    time, keys = q.shape[2], r.shape[1]
    by_distance = q @ F.pad(r, (0, 0, 1, 0)).transpose(1, 2)
    aligned = by_distance.flatten(2)[:, :, time:].unflatten(2, (time, keys))
    # Added rather than filled in: the backward of a sum is free, that of masked_fill passes over all scores once more.
    return aligned + aligned.new_zeros(hidden_keys.shape).masked_fill_(hidden_keys, float("-inf"))


def _eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, step by step; softmax in float32 at least. Returns output and probabilities before dropout."""
    scores = q @ k.transpose(2, 3) * scale + bias
    wide = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
    probabilities = scores.softmax(-1, dtype=wide).to(v.dtype)
    return F.dropout(probabilities, dropout, training=dropout > 0) @ v, probabilities
