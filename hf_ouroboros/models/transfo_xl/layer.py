"""One layer of a Transformer-XL: relative attention, then a position-wise feed-forward network."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import RelativeAttention
from .cache import MemoryCacheLayer
from .configuration_transfo_xl import TransfoXLConfig
from .context import AttentionContext


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, residual connection and layer norm."""

    def __init__(self, config: TransfoXLConfig):
        super().__init__()
        self.pre_lnorm = config.pre_lnorm
        # The names CoreNet.0 and CoreNet.3 are those of published checkpoints.
        self.CoreNet = nn.Sequential(
            nn.Linear(config.d_model, config.d_inner),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.d_inner, config.d_model),
            nn.Dropout(config.dropout),
        )
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, time, d_model] in and out."""
        if self.pre_lnorm:
            return hidden + self.CoreNet(self.layer_norm(hidden))
        return self.layer_norm(hidden + self.CoreNet(hidden))


class TransfoXLLayer(GradientCheckpointingLayer):
    """A layer; its own input is what goes into its memory.

    Args:
        config: the model's.
    """

    def __init__(self, config: TransfoXLConfig):
        super().__init__()
        self.dec_attn = RelativeAttention(config)
        self.pos_ff = FeedForward(config)

    def forward(
        self,
        hidden: torch.Tensor,
        context: AttentionContext,
        memory: torch.Tensor | None = None,
        cache: MemoryCacheLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Arguments and results as in `RelativeAttention.forward`."""
        hidden, probabilities = self.dec_attn(hidden, context, memory, cache)
        return self.pos_ff(hidden), probabilities
