"""Bits per character from summed negative log-likelihoods: sum of nll / (ln 2 * sum of characters)."""

from __future__ import annotations

import math

import datasets
import evaluate

_DESCRIPTION = """
Bits per character of a language model: how many bits it needs for a character of text, whatever its tokens
are. With bytes in place of characters these are bits per byte, the usual figure for enwik8 (where it is
called bpc too).
"""

_INPUTS = """
Args:
    nll (list of float): sum of the negative log-likelihoods, in nats, of the tokens of each sequence (or
    batch). characters (list of int): number of characters (or bytes) that these tokens stand for.

Returns:
    bits_per_character (float): sum of nll / (ln 2 * sum of characters).

Example:
    >>> bits_per_character.compute(nll=[0.6931471805599453, 1.3862943611198906], characters=[1, 2])
    {'bits_per_character': 1.0}
"""


class BitsPerCharacter(evaluate.Metric):
    """Character-weighted bits per character."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"nll": datasets.Value("float64"), "characters": datasets.Value("int64")}),
        )

    # `evaluate.combine` hands the inputs of every metric to each of them, hence `others`.
    def _compute(self, *, nll: list[float], characters: list[int], **others: object) -> dict[str, float]:
        count = int(sum(characters))
        if count <= 0:
            raise ValueError(f"bits_per_character needs at least one character, got a sum of {count}.")
        return {"bits_per_character": math.fsum(nll) / (math.log(2.0) * count)}
