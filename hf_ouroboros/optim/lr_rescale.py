"""lr_rescale: smaller learning rates for stages whose gradients are later (PipeMare)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..options import OneOf, Whole, option
from .compensation import Compensation, StageUpdate
from .matrices import algorithm_of

RESCALED = ("all", "adamw")


@dataclass(frozen=True)
class LearningRateRescaling(Compensation):
    """lr_k[u] = lr[u] / max(1, tau_k)^(1 - min(s/anneal, 1)), s being the updates since the delays started.

    Yang, Zhang, Yang, Re, Aberger, De Sa, "PipeMare: Asynchronous Pipeline Parallel DNN Training" (MLSys 2021), technique
    T1. Stages that are at most one update late keep their learning rate.

    Args:
        anneal: updates after which all stages have the full learning rate; 0 to keep the smaller ones.
        rescaled: "all", or "adamw" to leave alone the matrices that `muon` or `basis_rotation` step.
    """

    name = "lr_rescale"
    anneal: int = option(1000, Whole(0, 2**40))
    rescaled: str = option("all", OneOf(*RESCALED))

    def learning_rate_factor(self, group: Mapping[str, Any], update: StageUpdate) -> float:
        """At most 1."""
        if self.rescaled == "adamw" and algorithm_of(group) not in (None, "adamw"):
            return 1.0
        exponent = 1.0 - min(update.delayed_before / self.anneal, 1.0) if self.anneal else 1.0
        factor: float = max(1.0, update.delay) ** -exponent
        return factor
