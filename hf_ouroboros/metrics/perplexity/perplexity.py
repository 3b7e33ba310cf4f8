"""Perplexity from summed negative log-likelihoods, weighted by tokens: exp(sum of nll / sum of tokens)."""

from __future__ import annotations

import math

import datasets
import evaluate

_DESCRIPTION = """
Perplexity of a language model: the exponential of the mean negative log-likelihood per token. Every token has
the same weight, however the tokens are spread over sequences and batches.
"""

_INPUTS = """
Args:
    nll (list of float): sum of the negative log-likelihoods, in nats, of the tokens of each sequence (or
    batch). tokens (list of int): number of tokens in each of these sums.

Returns:
    perplexity (float): exp of the mean; infinite where that overflows.
    loss_per_token (float): the mean itself, in nats.

Example:
    >>> perplexity.compute(nll=[2.0, 4.0], tokens=[1, 2])
    {'perplexity': 7.38905609893065, 'loss_per_token': 2.0}
"""


class Perplexity(evaluate.Metric):
    """Token-weighted perplexity."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    # `evaluate.combine` hands the inputs of every metric to each of them, hence `others`.
    def _compute(self, *, nll: list[float], tokens: list[int], **others: object) -> dict[str, float]:
        count = int(sum(tokens))
        if count <= 0:
            raise ValueError(f"perplexity needs at least one token, got tokens that sum to {count}.")
        mean = math.fsum(nll) / count
        try:
            perplexity = math.exp(mean)
        except OverflowError:
            perplexity = math.inf
        return {"perplexity": perplexity, "loss_per_token": mean}
