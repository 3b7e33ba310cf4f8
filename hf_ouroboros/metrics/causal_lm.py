"""Causal language-model metrics for Trainer, computed without the `evaluate` library.

    trainer = OuroborosTrainer(..., compute_metrics=compute_metrics,
                               preprocess_logits_for_metrics=preprocess_logits_for_metrics)

    logits [B, S, V] --preprocess, per batch--> ids, nll [B, S-1] --compute, once--> metrics

With `batch_eval_metrics=True` use `CausalLMMetrics()` in place of `compute_metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction

IGNORE_INDEX = -100
_CHUNK_ELEMENTS = 2**24  # float32 logits alive at once: 64 MiB


def preprocess_logits_for_metrics(
    logits: Tensor | tuple[Tensor, ...], labels: Tensor | None
) -> tuple[Tensor, Tensor] | Tensor:
    """Reduce logits to what the metrics need, so that Trainer does not gather [B, S, V] numbers.

    Args:
        logits: [B, S, V], or a tuple that begins with them; position s predicts the label of position s+1.
        labels: [B, S], not shifted, -100 where nothing counts; None where there are none.

    Returns:
        The predicted ids (int32) and the negative log-likelihoods in nats (float32, 0 where the label is
        -100), both [B, S-1] and aligned with `labels[:, 1:]`; only the ids if there are no labels.
    """
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    logits = logits[:, :-1]
    ids = logits.argmax(dim=-1).to(torch.int32)
    if labels is None:
        return ids
    targets = labels[:, 1:].to(logits.device)
    nll = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    # A float32 copy of all logits would be the largest tensor of the whole evaluation.
    positions = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for row in range(logits.shape[0]):
        for start in range(0, logits.shape[1], positions):
            part = (row, slice(start, start + positions))
            nll[part] = functional.cross_entropy(
                logits[part].float(), targets[part].long(), reduction="none", ignore_index=IGNORE_INDEX
            )
    return ids, nll


@dataclass
class _Sums:
    """What the metrics are made of; sums of parts are sums of the whole."""

    nll: float = 0.0
    tokens: int = 0
    correct: int = 0

    def add(self, prediction: EvalPrediction) -> None:
        for ids, nll, labels in _batches(prediction):
            targets = labels[:, 1:]
            counted = targets != IGNORE_INDEX
            self.nll += float(nll[counted].sum(dtype=np.float64))
            self.tokens += int(counted.sum())
            self.correct += int((ids == targets)[counted].sum())

    def metrics(self) -> dict[str, float]:
        if self.tokens == 0:
            raise ValueError("No label to predict: all evaluation labels after the first are -100.")
        loss = self.nll / self.tokens
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return {
            "loss_per_token": loss,
            "perplexity": perplexity,
            "token_accuracy": self.correct / self.tokens,
        }


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`loss_per_token` (nats), `perplexity` and `token_accuracy` of an evaluation, weighted by tokens.

    Args:
        prediction: what Trainer gathered: predictions from `preprocess_logits_for_metrics` and labels [N, S].

    Raises:
        ValueError: there is no label to predict, or the predictions are not those of the function above.
    """
    sums = _Sums()
    sums.add(prediction)
    return sums.metrics()


class CausalLMMetrics:
    """`compute_metrics` for `batch_eval_metrics=True`: keeps three sums instead of all predictions."""

    def __init__(self) -> None:
        self._sums = _Sums()

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; with `compute_result` return the metrics of all batches so far and start afresh."""
        self._sums.add(prediction)
        if not compute_result:
            return {}
        sums, self._sums = self._sums, _Sums()
        return sums.metrics()


def _batches(prediction: EvalPrediction) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, nll, labels) of each batch; a list of batches comes from `eval_do_concat_batches=False`."""
    predictions: Any = prediction.predictions
    labels: Any = prediction.label_ids
    if not isinstance(labels, list):
        predictions, labels = [predictions], [labels]
    for batch_predictions, batch_labels in zip(predictions, labels, strict=True):
        if not isinstance(batch_predictions, (tuple, list)) or len(batch_predictions) != 2:
            raise ValueError(
                "compute_metrics needs (ids, nll) predictions: pass hf_ouroboros.metrics.causal_lm."
                "preprocess_logits_for_metrics to the trainer as preprocess_logits_for_metrics."
            )
        yield _numpy(batch_predictions[0]), _numpy(batch_predictions[1]), _numpy(batch_labels)


def _numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
