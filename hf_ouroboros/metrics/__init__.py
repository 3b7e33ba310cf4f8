"""Language-model metrics: modules for the `evaluate` library, and functions for Trainer that need none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRICS = ("bits_per_character", "perplexity", "token_accuracy")


class UnknownMetricError(ValueError):
    """There is no metric of this name in the package."""


def load(name: str, **options: Any) -> EvaluationModule:
    """Load one of the package's metrics with the `evaluate` library, without network access.

    Args:
        name: one of `METRICS`.
        options: passed on to `evaluate.load`, for instance `keep_in_memory=True` or `experiment_id`.

    Raises:
        UnknownMetricError: there is no such metric.
        ImportError: the `evaluate` library is not installed.
    """
    if name not in METRICS:
        raise UnknownMetricError(f"No metric {name!r}; known are {', '.join(METRICS)}.")
    try:
        import evaluate
    except ImportError as error:
        raise ImportError(
            "Metrics are loaded by the evaluate library: pip install evaluate. For Trainer's "
            "compute_metrics, hf_ouroboros.metrics.causal_lm works without it."
        ) from error
    return evaluate.load(str(Path(__file__).parent / name), **options)
