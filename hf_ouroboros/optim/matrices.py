"""Two optimizers as one: one for the matrices inside the layers, AdamW for everything else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.training_args import OptimizerNames

from ..partition.experts import routing_parameters

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..partition.stages import Stage

_ALGORITHM = "algorithm"


class MatricesAndAdamW(torch.optim.Optimizer):
    """`matrix_optimizer` for some matrices and `torch.optim.AdamW` for all other parameters.

    Every group given is split in two, so learning rates, schedules and weight decay stay the groups'.

    Args:
        params: parameters or groups, as for any optimizer.
        matrices: the parameters for `matrix_optimizer`, each with two dimensions.
        own: further arguments of `matrix_optimizer`.
        lr: learning rate of both.
        weight_decay: decoupled, of both.
        betas: AdamW's.
        eps: AdamW's.
        fused: whether AdamW steps all of its parameters by one kernel; None for torch's default.
    """

    algorithm: str
    matrix_optimizer: type[torch.optim.Optimizer]

    def __init__(
        self,
        params: Iterable[Any],
        matrices: Iterable[nn.Parameter],
        own: Mapping[str, Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
    ):
        chosen = {id(parameter) for parameter in matrices}
        adamw = torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused)
        make: Callable[..., torch.optim.Optimizer] = self.matrix_optimizer
        split: list[dict[str, Any]] = []
        for group in adamw.param_groups:
            mine = [p for p in group["params"] if id(p) in chosen]
            rest = [p for p in group["params"] if id(p) not in chosen]
            if mine:
                made = make(mine, lr=group["lr"], weight_decay=group["weight_decay"], **own)
                split.append({**made.param_groups[0], _ALGORITHM: self.algorithm})
            if rest:
                split.append({**group, "params": rest, _ALGORITHM: "adamw"})
        super().__init__(split, {})
        self.defaults = adamw.defaults

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both, over the parameters that have a gradient."""
        loss = loss_of(closure)
        for algorithm, kind in ((self.algorithm, self.matrix_optimizer), ("adamw", torch.optim.AdamW)):
            # The other optimizer on our groups and our state: a shallow view, as the engine cuts out its stages. Wrappers
            # and hooks around a step belong to this one.
            view = object.__new__(kind)
            view.__dict__.update(self.__dict__)
            view.__dict__.pop("step", None)
            view._optimizer_step_pre_hooks = OrderedDict()
            view._optimizer_step_post_hooks = OrderedDict()
            view.param_groups = [group for group in self.param_groups if group[_ALGORITHM] == algorithm]
            kind.step(view)
        return loss


def options_of(args: TrainingArguments) -> dict[str, Any]:
    """What a run's arguments say about AdamW, as Trainer gives it to the one that it makes."""
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "fused": True if args.optim == OptimizerNames.ADAMW_TORCH_FUSED else None,
    }


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """What the closure of a step returns, which computes the gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def algorithm_of(group: Mapping[str, Any]) -> str | None:
    """What steps a group of `MatricesAndAdamW`; None for a group of any other optimizer."""
    algorithm: str | None = group.get(_ALGORITHM)
    return algorithm


def hidden_matrices(stages: Iterable[Stage], decayed: Iterable[str], adapters: bool = False) -> list[nn.Parameter]:
    """The matrices inside the stages' layers by which hidden states are multiplied.

    They are the weights of linear modules. Not so embeddings and tables of relative positions that layers have, whose rows are
    looked up; routers of a mixture and other choices between a few; a matrix of one row, which is a vector; and experts that
    are stacked in one tensor, which the optimizers of matrices don't take. Experts that are modules of their own are. The
    matrices of adapters (PEFT's LoRA A and B) are left alone: only their product means something.

    Args:
        stages: of the model.
        decayed: names of the parameters that weight decay is meant for.
        adapters: whether those of adapters are taken, too.
    """
    names = set(decayed)
    return [
        parameter
        for stage in stages
        for layer, module in stage.layers.items()
        for name, parameter in layer_matrices(module).items()
        if f"{layer}.{name}" in names and (adapters or id(parameter) not in _adapters(module))
    ]


def layer_matrices(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of a layer, see `hidden_matrices`, by their names in it."""
    routing = routing_parameters(layer)
    return {
        f"{name}.weight" if name else "weight": cast(nn.Parameter, module.weight)  # torch calls it a Tensor
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module.weight.ndim == 2
        and min(module.weight.shape) > 1
        and id(module.weight) not in routing
    }


def _adapters(layer: nn.Module) -> set[int]:
    """Ids of the parameters that PEFT has added inside a layer; it names where they are."""
    return {
        id(parameter)
        for module in layer.modules()
        for name in getattr(type(module), "adapter_layer_names", ())
        if name != "modules_to_save" and (adapters := module._modules.get(name)) is not None
        for parameter in adapters.parameters()
    }
