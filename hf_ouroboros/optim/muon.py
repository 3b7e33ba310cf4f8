"""muon: orthogonalised momentum for the hidden matrices, AdamW for the rest, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from ..options import Checked, Flag, Number, OneOf, option
from .compensation import GIVEN_BY
from .matrices import MatricesAndAdamW, loss_of, options_of
from .orthogonal import orthogonalised

if TYPE_CHECKING:
    from transformers import TrainingArguments

MEASURED = "measure_rms_adamw"
ADJUSTMENTS = ("match_rms_adamw", "original", MEASURED)

MEAN_SQUARE, RMS = "mean_square", "adamw_rms"
"""Of the gradients, smoothed, and of AdamW's next step in learning rates: scalars in the optimizer's state."""


class DeviceMuon(torch.optim.Muon):
    """`torch.optim.Muon` that orthogonalises in the precision that its device is fast in, and can measure how far to go.

    torch multiplies in bfloat16 everywhere, for which CPUs without instructions for it take twenty to thirty times as long as in
    float32; a step then outweighs all forwards and backwards of a small update. On CPUs this one multiplies in float32, the
    same on all of them, and elsewhere in bfloat16.

    Args:
        params: matrices, or groups of them.
        adjust_lr_fn: torch's, or "measure_rms_adamw", see `measure_rms`.
        betas: AdamW's, for that measure.
        options: torch's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        adjust_lr_fn: str | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        **options: Any,
    ):
        super().__init__(params, adjust_lr_fn=None if adjust_lr_fn == MEASURED else adjust_lr_fn, **options)
        for group in self.param_groups:
            group.update(adjust_lr_fn=adjust_lr_fn, betas=betas)

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
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                if group["adjust_lr_fn"] == MEASURED:
                    measure_rms(ahead, parameter.grad, state, group)
                direction, rate = step_direction(ahead, state, group), adjusted_rate(group, parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-rate)
        return loss


def measure_rms(ahead: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    """Puts the root mean square of the step that AdamW would make, in learning rates, into a matrix's state.

    With one second moment for the whole matrix, and Muon's momentum instead of AdamW's:

        v   = b2 v + (1 - b2) mean(G^2)
        rms = min(1, rms(ahead) / (sum of its weights) / sqrt(v^) * (noise of AdamW's momentum) / (noise of ahead))

    ^: bias-corrected; the noises are what is left of gradients that are independent noise of size 1. So the result is 1 while
    all gradients are alike and sqrt((1 - b1) / (1 + b1)), 0.23 for b1 = 0.9, once they are nothing but noise.

    Args:
        ahead: what is orthogonalised, [A, B]: Muon's momentum, or Nesterov's look-ahead from it.
        gradient: the newest in it, G, [A, B].
        state: of the matrix; `step` and the two scalars are this function's.
        group: with `betas`, `momentum` and `nesterov`.
    """
    if MEAN_SQUARE not in state:
        state["step"] = torch.tensor(0.0)
        state[MEAN_SQUARE] = torch.zeros((), dtype=torch.float32, device=gradient.device)
    state["step"] += 1
    (beta1, beta2), momentum, count = group["betas"], group["momentum"], float(state["step"])
    state[MEAN_SQUARE].lerp_(gradient.float().square().mean(), 1 - beta2)
    older = momentum**2 if group["nesterov"] else momentum  # how much of the momentum before it is in `ahead`
    weights = 1 - older * momentum ** (count - 1)
    noise = math.sqrt((1 - older) ** 2 + older**2 * (1 - momentum) / (1 + momentum))
    adamw = math.sqrt((1 - beta1) / (1 + beta1))
    size = ahead.float().square().mean().sqrt() * (adamw / (noise * weights))
    typical = (state[MEAN_SQUARE] / (1 - beta2**count)).sqrt()
    state[RMS] = (size / typical.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1.0)


def step_direction(matrix: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> torch.Tensor:
    """What is subtracted from a matrix [A, B], but for `adjusted_rate`: its momentum's, orthogonalised."""
    direction = orthogonalised(matrix, group)
    return direction * state[RMS] if group["adjust_lr_fn"] == MEASURED else direction


def adjusted_rate(group: Mapping[str, Any], parameter: torch.Tensor) -> float:
    """The learning rate of a matrix by its shape, see `MuonAdamW`."""
    rows, columns = parameter.shape
    rate: float = group["lr"]
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return rate * 0.2 * math.sqrt(max(rows, columns))
    if group["adjust_lr_fn"] == MEASURED:
        return rate * math.sqrt(max(rows, columns))
    return rate * math.sqrt(max(1, rows / columns))


class MuonAdamW(MatricesAndAdamW):
    """`DeviceMuon` for some matrices and `torch.optim.AdamW` for all other parameters.

    Args:
        momentum: Muon's; Nesterov's form.
        adjust_lr_fn: how Muon's learning rate follows the shape [A, B] of a matrix: "match_rms_adamw" (0.2 sqrt(max(A, B)):
            its steps are as large as AdamW's usually are, whose learning rate and decay can be kept; the same for a matrix
            and its transpose, as which GPT-2's Conv1D keeps its weights), "measure_rms_adamw" (instead of 0.2 what it is for
            this matrix now: more in the first steps, and where gradients agree), or "original" (sqrt(max(1, A/B))).
        betas: AdamW's, also for that measure.
        adamw: further arguments of AdamW.
    """

    algorithm = "muon"
    matrix_optimizer = DeviceMuon

    def __init__(
        self,
        params: Iterable[Any],
        matrices: Iterable[nn.Parameter] = (),
        momentum: float = 0.95,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        **adamw: Any,
    ):
        own = {"momentum": momentum, "adjust_lr_fn": adjust_lr_fn, "betas": betas}
        super().__init__(params, matrices, own, betas=betas, **adamw)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; torch gives what is loaded the parameter's precision, but measures stay in float32."""
        super().load_state_dict(state_dict)
        indices = (index for group in state_dict["param_groups"] for index in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for index, parameter in zip(indices, parameters, strict=True):
            state = self.state.get(parameter, {})
            for key in state.keys() & {MEAN_SQUARE, RMS}:
                state[key] = state_dict["state"][index][key].to(parameter.device, copy=True)


@dataclass(frozen=True)
class Muon(Checked):
    """Muon (Jordan et al., 2024; learning rates matched to AdamW's: Liu et al., "Muon is Scalable for LLM Training", 2025).

    The matrices are the weights of the linear modules inside the layers, see `hidden_matrices`; embeddings, head, biases, norms,
    routers, and experts stacked in one tensor, as Transformers has them, are AdamW's: torch's Muon takes two dimensions. A
    fused matrix, such as GPT-2's of query, key and value, counts as one.

    Args:
        momentum: Muon's.
        adjust_lr_fn: "match_rms_adamw", "measure_rms_adamw" or "original", see `MuonAdamW`. To take the size of a step from
            another optimizer is called grafting (Agarwal et al., "Disentangling Adaptive Gradient Methods from Learning
            Rates", 2020).
        muon_adapters: whether it trains the matrices of adapters, too, which otherwise are AdamW's.
    """

    name = "muon"
    given_by = GIVEN_BY
    adapters_option = "muon_adapters"
    momentum: float = option(0.95, Number(0.0, 1.0, below=True))
    adjust_lr_fn: str = option("match_rms_adamw", OneOf(*ADJUSTMENTS))
    muon_adapters: bool = option(False, Flag())

    @property
    def adapters(self) -> bool:
        """Whether the matrices of adapters are trained by it."""
        return self.muon_adapters

    def optimizer(
        self, args: TrainingArguments, matrices: Iterable[nn.Parameter]
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Class and arguments, as Trainer's `optimizer_cls_and_kwargs`."""
        return MuonAdamW, {
            **options_of(args),
            "matrices": list(matrices),
            "momentum": self.momentum,
            "adjust_lr_fn": self.adjust_lr_fn,
        }
