"""What each unit of a model computes and keeps for one micro-batch, counted on the meta device: no weights, no time.

The model runs once, forward only, on tensors without data. FLOPs are those of its matrix products and attentions;
activation bytes are those that autograd keeps for the backward, each storage once, without the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from .outline import outline

EXPERT_OPTIONS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class UnitFacts:
    """One unit and one micro-batch.

    Args:
        modules: full names of its modules.
        kind: "embedding", "layer" or "head".
        parameters: how many it owns; a tied matrix counts at the embedding only.
        parameter_bytes: their size.
        flops: floating-point operations of its forward.
        activation_bytes: what is kept from its forward to its backward.
        output_bytes: size of the hidden state that it gives on.
        plan_cost: multiply-adds per token, by which the engine balances and interleaves on its own.
    """

    modules: tuple[str, ...]
    kind: str
    parameters: int
    parameter_bytes: int
    flops: float
    activation_bytes: float
    output_bytes: float
    plan_cost: float


@dataclass(frozen=True)
class ModelFacts:
    """All units of a model, for micro-batches of one shape.

    Args:
        name: of the model class.
        units: in execution order.
        tied_bytes: size of the matrix that embedding and head share; 0 where there is none.
        untrainable: why the model can only be planned; None where it can be trained.
        batch: rows of a micro-batch.
        time: tokens per row.
        dtype: of weights and activations.
    """

    name: str
    units: tuple[UnitFacts, ...]
    tied_bytes: int
    untrainable: str | None
    batch: int
    time: int
    dtype: torch.dtype

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return self.tied_bytes > 0

    @property
    def layers(self) -> int:
        """How many of the units are layers."""
        return sum(unit.kind == "layer" for unit in self.units)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(unit.parameters for unit in self.units)

    @property
    def flops(self) -> float:
        """Of a forward through the whole model."""
        return sum(unit.flops for unit in self.units)

    def for_batch(self, batch: int) -> ModelFacts:
        """The same for micro-batches of another size: everything but the weights grows with the rows."""
        factor = batch / self.batch
        units = tuple(
            replace(
                unit,
                flops=unit.flops * factor,
                activation_bytes=unit.activation_bytes * factor,
                output_bytes=unit.output_bytes * factor,
            )
            for unit in self.units
        )
        return replace(self, units=units, batch=batch)


def model_facts(config: PretrainedConfig, batch: int, time: int, dtype: torch.dtype = torch.float32) -> ModelFacts:
    """Counts for a causal language model of this configuration.

    Args:
        config: of the model.
        batch: rows of a micro-batch.
        time: tokens per row.
        dtype: of weights and activations.

    Raises:
        UnsupportedModelError: no causal language model, not a row of layers, or it does not run without data.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UnsupportedModelError(f"model_type {config.model_type!r} is no causal language model: {error}") from error
    experts = next((n for n in EXPERT_OPTIONS if (getattr(config, n, None) or 0) > 1), None)
    if experts is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {experts}={getattr(config, experts)}: what a mixture of experts computes depends "
            "on the data and can't be counted; plan a dense model"
        )
    plan = outline(model)
    tracer = _Tracer(model, [unit.modules[0] for unit in plan.units if unit.kind == "layer"])
    try:
        flops, kept, output = tracer.run(batch, time)
    except Exception as error:  # whatever a model does that needs data
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on the meta device ({type(error).__name__}: {error}), so its costs "
            "can't be counted"
        ) from error
    width = output * batch * time * dtype.itemsize
    seen: set[int] = set()
    units = []
    layer = 0
    for unit in plan.units:
        fresh = [p for name in unit.modules for p in model.get_submodule(name).parameters() if id(p) not in seen]
        fresh = list({id(p): p for p in fresh}.values())
        seen.update(id(p) for p in fresh)
        # The tracer sees one part before the layers, one per layer, and one after them, which is the last unit's.
        if unit.kind == "layer":
            layer += 1
        is_counted = unit.kind != "head" or unit is plan.units[-1]
        part = {"embedding": 0, "layer": layer, "head": len(kept) - 1}[unit.kind]
        units.append(
            UnitFacts(
                unit.modules,
                unit.kind,
                sum(p.numel() for p in fresh),
                sum(p.numel() * p.element_size() for p in fresh),
                float(flops[part]) if is_counted else 0.0,
                float(kept[part]) if is_counted else 0.0,
                float(width),
                unit.cost,
            )
        )
    if missing := [name for name, p in model.named_parameters() if id(p) not in seen]:
        raise UnsupportedModelError(
            f"{type(model).__name__} has parameters that are neither in its embedding, its layers nor its head "
            f"({missing[0]}, ...), so it is no plain row of layers and can't be planned"
        )
    tied = model.get_parameter(plan.tied_name) if plan.tied_name else None
    tied_bytes = 0 if tied is None else tied.numel() * tied.element_size()
    return ModelFacts(type(model).__name__, tuple(units), tied_bytes, plan.reason, batch, time, dtype)


class _Tracer:
    """Runs a model on the meta device and books what happens on the part that is running.

    Args:
        model: on the meta device.
        layer_names: its layers; part 0 is what comes before them, part i layer i-1, the last one what comes after.
    """

    def __init__(self, model: PreTrainedModel, layer_names: Sequence[str]):
        self.model = model
        self.part = 0
        self.flops = [0.0] * (len(layer_names) + 2)
        self.kept = [0.0] * (len(layer_names) + 2)
        self.output = 0
        self._layers = [model.get_submodule(name) for name in layer_names]
        self._counter = FlopCounterMode(display=False)
        self._known: dict[int, torch.UntypedStorage] = {
            p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()
        }
        self._booked = 0.0

    def run(self, batch: int, time: int) -> tuple[list[float], list[float], int]:
        """FLOPs and kept bytes of every part, and the width of the hidden state."""
        handles = [layer.register_forward_pre_hook(self._enter(i + 1)) for i, layer in enumerate(self._layers)]
        handles.append(self._layers[-1].register_forward_hook(self._leave))
        ids = torch.zeros(batch, time, dtype=torch.long, device="meta")
        # Four dimensions: a mask of two would be inspected, which needs data.
        mask = torch.ones(batch, 1, time, time, dtype=torch.bool, device="meta")
        self._known[mask.untyped_storage()._cdata] = mask.untyped_storage()
        positions = torch.zeros(batch, time, dtype=torch.long, device="meta")
        self.model.train()
        # Otherwise an unknown name of a loss is warned of; it is the ordinary one.
        self.model.loss_type = "ForCausalLM"
        hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        try:
            with self._counter, _FusedAttention(self._book), hooks:
                self.model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self._close_part(self.part)
        return self.flops, self.kept, self.output

    def _enter(self, part: int) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._close_part(part)

        return hook

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._close_part(len(self.flops) - 1)
        self.output = (output[0] if isinstance(output, tuple) else output).shape[-1]

    def _close_part(self, following: int) -> None:
        total = float(self._counter.get_total_flops())
        self.flops[self.part] += total - self._booked
        self._booked = total
        self.part = following

    def _book(self, flops: float) -> None:
        self.flops[self.part] += flops

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage  # kept alive, so that the key stays its own
            self.kept[self.part] += storage.nbytes()
        return tensor


class _FusedAttention(TorchFunctionMode):
    """Scaled dot product attention as fused kernels have it: no score matrix is kept.

    Args:
        book: told the FLOPs.
    """

    def __init__(self, book: Callable[[float], None]):
        super().__init__()
        self._book = book

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        batch, heads, time, width = query.shape
        self._book(2.0 * batch * heads * time * key.shape[-2] * (width + value.shape[-1]))
        return _KeepsInputsAndOutput.apply(query, key, value)


class _KeepsInputsAndOutput(torch.autograd.Function):
    """What a fused attention keeps: its inputs, its output, and one number per row and head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("only forwards run on the meta device")
