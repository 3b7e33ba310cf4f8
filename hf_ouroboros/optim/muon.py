"""muon: orthogonalised momentum for the hidden matrices, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedOptionError
from .matrices import MatricesAndAdamW

if TYPE_CHECKING:
    from transformers import TrainingArguments

ADJUSTMENTS = ("match_rms_adamw", "original")


class MuonAdamW(MatricesAndAdamW):
    """`torch.optim.Muon` for some matrices and `torch.optim.AdamW` for all other parameters.

    Args:
        momentum: Muon's; Nesterov's form.
        adjust_lr_fn: how Muon's learning rate follows the shape [A, B] of a matrix: "match_rms_adamw" (0.2 sqrt(max(A, B)):
            its steps are as large as AdamW's, whose learning rate and decay can be kept; the same for a matrix and its
            transpose, as which GPT-2's Conv1D keeps its weights) or "original" (sqrt(max(1, A/B))).
    """

    algorithm = "muon"
    matrix_optimizer = torch.optim.Muon

    def __init__(
        self,
        params: Iterable[Any],
        matrices: Iterable[nn.Parameter] = (),
        momentum: float = 0.95,
        adjust_lr_fn: str = "match_rms_adamw",
        **adamw: Any,
    ):
        super().__init__(params, matrices, {"momentum": momentum, "adjust_lr_fn": adjust_lr_fn}, **adamw)


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al., 2024; learning rates matched to AdamW's: Liu et al., "Muon is Scalable for LLM Training", 2025).

    The matrices are the two-dimensional weights inside the layers; embeddings, head, biases and norms are AdamW's. A fused
    matrix, such as GPT-2's of query, key and value, counts as one.

    Args:
        momentum: Muon's.
        adjust_lr_fn: "match_rms_adamw" or "original", see `MuonAdamW`.
    """

    name = "muon"
    momentum: float = 0.95
    adjust_lr_fn: str = "match_rms_adamw"

    def __post_init__(self) -> None:
        if self.adjust_lr_fn not in ADJUSTMENTS:
            raise UnsupportedOptionError(
                f"delay_compensation_args: adjust_lr_fn={self.adjust_lr_fn!r} is unknown; use one of {', '.join(ADJUSTMENTS)}"
            )

    def optimizer(
        self, args: TrainingArguments, matrices: Iterable[nn.Parameter]
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Class and arguments, as Trainer's `optimizer_cls_and_kwargs`."""
        return MuonAdamW, {
            "matrices": list(matrices),
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "momentum": self.momentum,
            "adjust_lr_fn": self.adjust_lr_fn,
        }
