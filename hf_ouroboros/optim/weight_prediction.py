"""weight_prediction: forwards with the weights that a stage is expected to have when the gradient is applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedOptionError
from ..options import Number, OneOf, option
from .basis_rotation import RotatedAdamW, rotated_direction
from .compensation import Compensation, StageUpdate
from .matrices import algorithm_of
from .muon import MuonAdamW, adjusted_rate, step_direction

PREVIOUS = "weights_before"
"""Weights before the last step, in the optimizer's state."""

FROM = ("momentum", "step")


@dataclass(frozen=True)
class WeightPrediction(Compensation):
    """The forwards of update u use w - s * (the step that the optimizer's momentum would make), s = horizon * tau_k.

        SGD          s * lr * m                                   m: momentum buffer
        Adam, AdamW  s * lr * (m^ / (sqrt(v^) + eps) + decay * w)  ^: bias-corrected; decay: AdamW's, decoupled
        Muon         s * (lr * decay * w + lr' * NS(m))           NS: Newton-Schulz, lr': adjusted to the shape
        rotated      as AdamW, in the rotated basis               see basis_rotation

    The momentum stands for the gradients to come: the s steps are taken to be equal. Each stage predicts with its own
    delay and from its own weights of now; all ticks of an update use the same prediction, with the learning rates as
    they were when the update opened. No prediction: before a parameter's first step, in synchronous updates, for frozen
    parameters. The real weights are what is stepped, evaluated and saved.

    With prediction="step" the s steps are taken to be like the last one, whatever optimizer made it: w + s (w - w'), w' being
    the weights before it. For Adam, whose steps are those of its momentum, this is nearly the same; for Muon it is its real
    step, Nesterov's look-ahead included, and saves the second orthogonalisation. No prediction before the first step with a
    delay.

    Chen, Yang, Cheng, "Efficient and Robust Parallel DNN Training through Model Parallelism on Multi-GPU Platform"
    (SpecTrain, 2018); Guan, Yin, Li, Lu, "XPipe" (2019) and "PipeOptim" (2023).

    Costs a copy of a stage's weights per update in flight, which a pending backward keeps anyway; with "momentum" Muon's
    orthogonalisation runs once more per update, with "step" the optimizer's state has another copy of the weights.

    Args:
        horizon: share of the delay to predict over.
        prediction: "momentum" or "step".
    """

    name = "weight_prediction"
    predicts = True
    horizon: float = option(1.0, Number(0.0))
    prediction: str = option("momentum", OneOf(*FROM))

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Only optimizers whose momentum tells the coming step; with "step" all."""
        if self.prediction == "step":
            return
        kind = type(optimizer)
        if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, MuonAdamW, RotatedAdamW):
            library = kind.__module__.partition(".")[0]  # bitsandbytes has an AdamW, too
            raise UnsupportedOptionError(
                f"delay_compensation='weight_prediction' knows how SGD with momentum, Adam, AdamW, muon and "
                f"basis_rotation go on, not {kind.__name__} of {library}; set delay_compensation_args='prediction=step'"
            )
        if any(group.get("momentum") == 0 for group in optimizer.param_groups):
            raise UnsupportedOptionError(
                "delay_compensation='weight_prediction' predicts from momentum, and SGD has none here; set "
                "optim_args='momentum=0.9' or delay_compensation_args='prediction=step'"
            )
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise UnsupportedOptionError(
                "delay_compensation='weight_prediction' does not know maximize=True; leave it off"
            )

    def predict(
        self, parameter: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any], update: StageUpdate
    ) -> torch.Tensor | None:
        """See the class."""
        steps = self.horizon * update.delay
        if steps == 0 or not state:
            return None
        if self.prediction == "step":
            previous: torch.Tensor | None = state.get(PREVIOUS)
            return None if previous is None else torch.lerp(parameter, previous, -steps)
        rate: float = group["lr"]
        if algorithm_of(group) == "muon":
            decayed: torch.Tensor = parameter - (steps * rate * group["weight_decay"]) * parameter
            direction = step_direction(state["momentum_buffer"], state, group)
            return decayed.sub(direction, alpha=steps * adjusted_rate(group, parameter))
        if algorithm_of(group) == "rotated":
            if state["step"] == 0:
                return None
            decay: float = group["weight_decay"]
            return parameter - (steps * rate) * (rotated_direction(state, group) + decay * parameter)
        if "exp_avg" in state:
            return parameter - (steps * rate) * _adam_direction(parameter, state, group)
        momentum: torch.Tensor = state["momentum_buffer"]
        return parameter - (steps * rate) * momentum

    def keeps_weights(self, update: StageUpdate) -> bool:
        """Only if they are what predictions are made of."""
        return self.prediction == "step" and update.delay > 0

    def record(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        before: torch.Tensor | None,
        state: dict[str, Any],
        update: StageUpdate,
    ) -> None:
        """Keeps the weights before the step, if there is something to predict."""
        if self.keeps_weights(update):
            state[PREVIOUS] = before
        else:
            state.pop(PREVIOUS, None)


def _adam_direction(parameter: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> torch.Tensor:
    (beta1, beta2), count = group["betas"], state["step"]
    if count.device.type == "cpu":
        count = float(count)  # elsewhere a read would make the device wait
    variance = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    direction: torch.Tensor = state["exp_avg"] / (1 - beta1**count)
    direction = direction / ((variance / (1 - beta2**count)).sqrt() + group["eps"])
    return direction + group["weight_decay"] * parameter if group["decoupled_weight_decay"] else direction
