"""muon: orthogonalised momentum for the hidden matrices, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedOptionError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..partition.stages import Stage

ADJUSTMENTS = ("match_rms_adamw", "original")
_ALGORITHM = "algorithm"


def is_muon(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group of `MuonAdamW` is Muon's."""
    return group.get(_ALGORITHM) == "muon"


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for some matrices and `torch.optim.AdamW` for all other parameters.

    Every group given is split in two, so learning rates, schedules and weight decay stay the groups'.

    Args:
        params: parameters or groups, as for any optimizer.
        matrices: the parameters for Muon, each with two dimensions.
        lr: learning rate of both.
        weight_decay: decoupled, of both.
        betas: AdamW's.
        eps: AdamW's.
        momentum: Muon's; Nesterov's form.
        adjust_lr_fn: how Muon's learning rate follows the shape [A, B] of a matrix: "match_rms_adamw" (0.2 sqrt(max(A, B)):
            its steps are as large as AdamW's, whose learning rate and decay can be kept; the same for a matrix and its
            transpose, as which GPT-2's Conv1D keeps its weights) or "original" (sqrt(max(1, A/B))).
    """

    def __init__(
        self,
        params: Iterable[Any],
        matrices: Iterable[nn.Parameter] = (),
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        adjust_lr_fn: str = "match_rms_adamw",
    ):
        chosen = {id(parameter) for parameter in matrices}
        both = {"lr": lr, "weight_decay": weight_decay}
        adamw = torch.optim.AdamW(params, **both, betas=betas, eps=eps)
        split: list[dict[str, Any]] = []
        for group in adamw.param_groups:
            own = [p for p in group["params"] if id(p) in chosen]
            rest = [p for p in group["params"] if id(p) not in chosen]
            if own:
                kept = {key: group[key] for key in both}
                made = torch.optim.Muon(own, **kept, momentum=momentum, adjust_lr_fn=adjust_lr_fn).param_groups
                split.append({**made[0], _ALGORITHM: "muon"})
            if rest:
                split.append({**group, "params": rest, _ALGORITHM: "adamw"})
        super().__init__(split, {})
        self.defaults = adamw.defaults

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both, over the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for algorithm, kind in (("muon", torch.optim.Muon), ("adamw", torch.optim.AdamW)):
            # The library's optimizer on our groups and our state: a shallow view, as the engine cuts out its stages.
            view = object.__new__(kind)
            view.__dict__.update(self.__dict__)
            view.__dict__.pop("step", None)  # a learning rate scheduler's wrapper around this one
            view.param_groups = [group for group in self.param_groups if group[_ALGORITHM] == algorithm]
            kind.step(view)
        return loss


def hidden_matrices(stages: Iterable[Stage], decayed: Iterable[str]) -> list[nn.Parameter]:
    """The two-dimensional weights inside the stages' layers.

    Args:
        stages: of the model.
        decayed: names of the parameters that weight decay is meant for, which leaves out biases of two dimensions.
    """
    names = set(decayed)
    return [
        parameter
        for stage in stages
        for layer in stage.layer_names
        for name, parameter in stage.get_submodule(layer).named_parameters(prefix=layer)
        if parameter.ndim == 2 and name in names
    ]


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al., 2024; learning rates matched to AdamW's: Liu et al., "Muon is Scalable for LLM Training", 2025).

    The matrices are the two-dimensional weights inside the layers; embeddings, head, biases and norms are AdamW's. A fused
    matrix, such as GPT-2's of query, key and value, counts as one.

    Args:
        momentum: Muon's.
        adjust_lr_fn: see `MuonAdamW`.
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
