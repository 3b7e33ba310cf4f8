"""lr_rescale: smaller learning rates for stages whose gradients are later, at the beginning of a run (PipeMare)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedOptionError
from .compensation import Compensation, StageUpdate


@dataclass(frozen=True)
class LearningRateRescaling(Compensation):
    """lr_k[u] = lr[u] / max(1, tau_k)^(1 - min(s/anneal, 1)), s being the updates since the delays started.

    Yang, Zhang, Yang, Re, Aberger, De Sa, "PipeMare: Asynchronous Pipeline Parallel DNN Training" (MLSys 2021), technique
    T1. Stages that are at most one update late keep their learning rate.

    Args:
        anneal: updates after which all stages have the full learning rate.
    """

    name = "lr_rescale"
    anneal: int = 1000

    def __post_init__(self) -> None:
        if self.anneal < 1:
            raise UnsupportedOptionError(f"delay_compensation_args: anneal={self.anneal} must be at least 1 update")

    def learning_rate_factor(self, update: StageUpdate) -> float:
        """At most 1."""
        exponent = 1.0 - min(update.delayed_before / self.anneal, 1.0)
        return max(1.0, update.delay) ** -exponent
