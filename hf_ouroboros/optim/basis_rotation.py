"""basis_rotation: Adam for the hidden matrices in the eigenbasis of their gradients' covariances, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from ..options import Checked, Flag, Number, Whole, option
from .compensation import GIVEN_BY
from .matrices import MatricesAndAdamW, loss_of, options_of

if TYPE_CHECKING:
    from transformers import TrainingArguments


class RotatedAdam(torch.optim.Optimizer):
    """Adam on Q_L' G Q_R, for matrices G; the step is rotated back.

        L = cov L + (1 - cov) G G',  R = cov R + (1 - cov) G' G      covariances, starting with those of the first gradient
        Q_L, Q_R                                                     their eigenvectors; every `refresh` steps one step
                                                                     of orthogonal iteration, Q = qr(L Q)
        M = b1 M + (1 - b1) G                                        momentum, not rotated, so it survives a new basis
        V = b2 V + (1 - b2) (Q_L' G Q_R)^2                           rotated
        W -= lr (Q_L (M'^ / (sqrt(V^) + eps)) Q_R' + decay W)        with M' = Q_L' M Q_R; ^: bias-corrected

    The first gradient only gives the bases: in them it has zeros, which a division by sqrt(V) would blow up.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        weight_decay: decoupled.
        betas: b1 and b2.
        eps: keeps the division finite.
        covariance_decay: cov.
        refresh: steps between new bases.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        covariance_decay: float = 0.95,
        refresh: int = 10,
    ):
        values = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, {**values, "covariance_decay": covariance_decay, "refresh": refresh})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the matrices that have a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and _observe(parameter.grad, state := self.state[parameter], group):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(group["lr"] * rotated_direction(state, group))
        return loss


def rotated_direction(state: Mapping[str, Any], group: Mapping[str, Any]) -> torch.Tensor:
    """What a step subtracts, divided by the learning rate, without decay: a matrix in the original basis."""
    (beta1, beta2), count = group["betas"], float(state["step"])
    left: torch.Tensor = state["left_basis"]
    right: torch.Tensor = state["right_basis"]
    momentum: torch.Tensor = left.T @ state["exp_avg"] @ right / (1 - beta1**count)
    scaled: torch.Tensor = momentum / ((state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"])
    return left @ scaled @ right.T


def _observe(gradient: torch.Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> bool:
    """Takes a gradient into covariances, bases and moments; returns whether there is a step to make."""
    left, right = gradient @ gradient.T, gradient.T @ gradient
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["left"], state["right"] = left, right
        state["left_basis"], state["right_basis"] = _eigenvectors(left), _eigenvectors(right)
        return False
    state["left"].lerp_(left, 1 - group["covariance_decay"])
    state["right"].lerp_(right, 1 - group["covariance_decay"])
    state["step"] += 1
    if int(state["step"]) % group["refresh"] == 0:
        for side in ("left", "right"):
            turned = (state[side] @ state[f"{side}_basis"]).float()
            state[f"{side}_basis"] = torch.linalg.qr(turned).Q.to(gradient.dtype)
    beta1, beta2 = group["betas"]
    rotated = state["left_basis"].T @ gradient @ state["right_basis"]
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].lerp_(rotated.square(), 1 - beta2)
    return True


def _eigenvectors(covariance: torch.Tensor) -> torch.Tensor:
    """Columns by falling eigenvalue, the order that orthogonal iteration keeps."""
    vectors: torch.Tensor = torch.linalg.eigh(covariance.float()).eigenvectors
    return vectors.flip(1).to(covariance.dtype)


class RotatedAdamW(MatricesAndAdamW):
    """`RotatedAdam` for some matrices and `torch.optim.AdamW` for all other parameters.

    Args:
        betas: of both.
        eps: of both.
        covariance_decay: `RotatedAdam`'s.
        refresh: `RotatedAdam`'s.
    """

    algorithm = "rotated"
    matrix_optimizer = RotatedAdam

    def __init__(
        self,
        params: Iterable[Any],
        matrices: Iterable[nn.Parameter] = (),
        covariance_decay: float = 0.95,
        refresh: int = 10,
        **adamw: Any,
    ):
        own = {key: adamw[key] for key in ("betas", "eps") if key in adamw}
        super().__init__(params, matrices, own | {"covariance_decay": covariance_decay, "refresh": refresh}, **adamw)


@dataclass(frozen=True)
class BasisRotation(Checked):
    """Adam in a rotated basis (SOAP: Vyas et al., 2024), found in 2026 to bear the delays of asynchronous pipelines well.

    The matrices are those of `muon`. Costs, for a matrix [A, B], 2 A^2 + 2 B^2 numbers of state, five products of its size per
    update, and a QR decomposition of either side every `refresh` updates.

    Args:
        covariance_decay: how slowly the covariances forget.
        refresh: updates between new bases.
        rotate_adapters: whether it trains the matrices of adapters, too, which otherwise are AdamW's.
    """

    name = "basis_rotation"
    given_by = GIVEN_BY
    adapters_option = "rotate_adapters"
    covariance_decay: float = option(0.95, Number(0.0, 1.0, below=True))
    refresh: int = option(10, Whole(1, 10**9))
    rotate_adapters: bool = option(False, Flag())

    @property
    def adapters(self) -> bool:
        """Whether the matrices of adapters are trained by it."""
        return self.rotate_adapters

    def optimizer(
        self, args: TrainingArguments, matrices: Iterable[nn.Parameter]
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Class and arguments, as Trainer's `optimizer_cls_and_kwargs`."""
        return RotatedAdamW, {
            **options_of(args),
            "matrices": list(matrices),
            "covariance_decay": self.covariance_decay,
            "refresh": self.refresh,
        }
