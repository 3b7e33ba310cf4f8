"""nesterov: Adam with a long Nesterov look-ahead, whose momentum carries the weights to where late gradients fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..options import Checked, Number, option
from .compensation import GIVEN_BY

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Nesterov(Checked):
    """`torch.optim.NAdam` with beta1 = 0.99 and decoupled weight decay.

    Ajanthan, Ramasinghe, Zuo, Avraham, Long, "Nesterov Method for Asynchronous Pipeline Parallel Optimization" (ICML 2025):
    with d[u] = gamma (w[u] - w[u-1]) and w[u+1] = w[u] + d[u] - lr (1 - gamma) g, the look-ahead d acts as the correction of
    the delay; the factor 1 - gamma on the late gradient keeps it stable. In practice this is NAdam with beta1 = 0.99 (Dozat
    2016); beta2, eps, learning rate and decay are the run's.

    Args:
        beta1: gamma.
        momentum_decay: psi, NAdam's warm-up of gamma: gamma[u] = beta1 (1 - 0.96^(u psi) / 2).
    """

    name = "nesterov"
    given_by = GIVEN_BY
    adapters = True  # it takes everything
    beta1: float = option(0.99, Number(0.0, 1.0, below=True))
    momentum_decay: float = option(4e-3, Number(0.0))

    def optimizer(
        self, args: TrainingArguments, matrices: Iterable[nn.Parameter]
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Class and arguments, as Trainer's `optimizer_cls_and_kwargs`."""
        return torch.optim.NAdam, {
            "lr": args.learning_rate,
            "betas": (self.beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "momentum_decay": self.momentum_decay,
            "decoupled_weight_decay": True,
        }
