"""Adaptive input and softmax: rare words get narrow embeddings and a two-step probability.

The vocabulary is cut into a shortlist and clusters of ever rarer words (Grave et al. 2017, arXiv 1609.04309; for the
input Baevski and Auli 2019, arXiv 1809.10853). Cluster i >= 1 is one entry of the first softmax, number cutoffs[0]+i-1:

    log p(word of cluster i) = log p(entry of cluster i) + log p(word | cluster i)

Clusters without a word in the batch are computed on zero rows all the same: then no parameter lacks a gradient.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_transfo_xl import TransfoXLConfig

IGNORED = -100


class AdaptiveEmbedding(nn.Module):
    """Token ids to hidden state, scaled by sqrt(d_model).

    Args:
        config: the model's.
    """

    def __init__(self, config: TransfoXLConfig):
        super().__init__()
        self.cluster_starts = config.cluster_starts
        self.scale = config.d_model**0.5
        shapes = list(zip(config.table_sizes, config.table_widths, strict=True))
        self.emb_layers = nn.ModuleList(nn.Embedding(size, width) for size, width in shapes)
        self.emb_projs = nn.ParameterList()
        if config.has_projections:
            self.emb_projs.extend(nn.Parameter(torch.empty(config.d_model, width)) for _, width in shapes)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [batch, time] to [batch, time, d_model]."""
        if len(self.emb_layers) == 1:
            return self._project(self.emb_layers[0](input_ids), 0) * self.scale
        ids = input_ids.flatten()
        cluster = _clusters(ids, self.cluster_starts)
        rows, pieces = [], []
        for i, (table, start) in enumerate(zip(self.emb_layers, self.cluster_starts, strict=True)):
            row = (cluster == i).nonzero().squeeze(1)
            rows.append(row)
            pieces.append(self._project(table(ids[row] - start), i))
        back = torch.cat(rows).argsort()
        return torch.cat(pieces)[back].unflatten(0, input_ids.shape) * self.scale

    def _project(self, embedded: torch.Tensor, table: int) -> torch.Tensor:
        return F.linear(embedded, self.emb_projs[table]) if len(self.emb_projs) else embedded


class AdaptiveSoftmax(nn.Module):
    """Hidden state to log-probabilities, or with labels directly to the loss, without an array over the vocabulary.

    Args:
        config: the model's.
    """

    def __init__(self, config: TransfoXLConfig):
        super().__init__()
        self.cluster_starts = config.cluster_starts
        widths = config.table_widths
        self.out_layers = nn.ModuleList(
            nn.Linear(width, size) for size, width in zip(config.table_sizes, widths, strict=True)
        )
        self.out_projs = nn.ParameterList()
        if config.has_projections:
            # With one table for all clusters each cluster still has a projection of its own.
            per_cluster = widths if config.div_val > 1 else widths * len(self.cluster_starts)
            self.out_projs.extend(nn.Parameter(torch.empty(config.d_model, width)) for width in per_cluster)
        if config.cutoffs:
            self.cluster_weight = nn.Parameter(torch.empty(len(config.cutoffs), config.d_embed))
            self.cluster_bias = nn.Parameter(torch.empty(len(config.cutoffs)))

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Without labels log-probabilities, with labels the loss.

        Args:
            hidden: [batch, time, d_model].
            labels: int64 [batch, time], -100 where ignored; position t is predicted from position t-1 of `hidden`.
            shift_labels: the same already shifted: position t is predicted from position t; wins over `labels`.
            num_items_in_batch: what the summed loss is divided by; default: the number of labels that count.

        Returns:
            Log-probabilities [batch, time, vocab_size]; or the loss, a scalar, and the loss of every position in nats,
            [batch, time-1] ([batch, time] with shift_labels), 0 where ignored. At least float32.
        """
        if shift_labels is None:
            if labels is None:
                return self._log_probabilities(hidden)
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        losses = self._losses(hidden.flatten(0, 1), shift_labels.flatten()).view(shift_labels.shape)
        if num_items_in_batch is None:
            # Without a single label that counts the loss is 0, not 0/0.
            num_items_in_batch = (shift_labels != IGNORED).sum().clamp(min=1)
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(losses.device)
        return losses.sum() / num_items_in_batch, losses

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self._scores(hidden, 0).log_softmax(-1)
        shortlist = head.shape[-1] - len(self.cluster_starts) + 1
        parts = [head[..., :shortlist]]
        for i in range(1, len(self.cluster_starts)):
            parts.append(head[..., shortlist + i - 1, None] + self._scores(hidden, i).log_softmax(-1))
        return torch.cat(parts, -1)

    def _losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of every row: hidden [rows, d_model], targets int64 [rows] -> [rows]."""
        ignored = targets == IGNORED
        targets = targets.masked_fill(ignored, 0)
        cluster = _clusters(targets, self.cluster_starts)
        head = self._scores(hidden, 0)
        shortlist = head.shape[-1] - len(self.cluster_starts) + 1
        losses = _nll(head, torch.where(cluster == 0, targets, shortlist + cluster - 1))
        for i in range(1, len(self.cluster_starts)):
            row = (cluster == i).nonzero().squeeze(1)
            inside = _nll(self._scores(hidden[row], i), targets[row] - self.cluster_starts[i])
            losses = losses.index_add(0, row, inside)
        return losses.masked_fill(ignored, 0.0)

    def _scores(self, hidden: torch.Tensor, cluster: int) -> torch.Tensor:
        """Logits of the words of a cluster, after those of the shortlist also of the clusters; at least float32."""
        if len(self.out_projs):
            hidden = hidden @ self.out_projs[cluster]
        scores = F.linear(hidden, *self._table(cluster))
        if cluster == 0 and len(self.cluster_starts) > 1:
            scores = torch.cat([scores, F.linear(hidden, self.cluster_weight, self.cluster_bias)], -1)
        return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores

    def _table(self, cluster: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the words of a cluster."""
        if len(self.out_layers) > 1:
            layer = cast(nn.Linear, self.out_layers[cluster])
            return layer.weight, layer.bias
        layer = cast(nn.Linear, self.out_layers[0])
        ends = [*self.cluster_starts[1:], None]
        words = slice(self.cluster_starts[cluster], ends[cluster])
        return layer.weight[words], layer.bias[words]


def _clusters(ids: torch.Tensor, cluster_starts: list[int]) -> torch.Tensor:
    """Cluster of every id; ids outside of the vocabulary fall into the first or last, whose table then complains."""
    ends = torch.tensor(cluster_starts[1:], device=ids.device, dtype=ids.dtype)
    return torch.bucketize(ids.contiguous(), ends, right=True)


def _nll(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores, targets, reduction="none")
