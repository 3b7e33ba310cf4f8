"""What each unit of a model computes and keeps for one micro-batch, from a configuration: no weights, no device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from ..adapters.wrapping import lora_on_meta
from ..errors import UnsupportedModelError
from ..partition.experts import find_experts
from ..partition.multiplied import multiplied
from .autocasting import DTYPE as COMPUTED
from .outline import outline
from .packing import packed_sizes
from .tracing import Part, trace


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
        idle_parameters: how many of the parameters are of experts that a token does not pass.
        trained_bytes: size of the parameters that are trained; None for all.
        unpacked_bytes: size that its packed matrices have when they are unpacked for a product, one after the other.
        largest_unpacked: of these, the largest.
        later_bytes: what a divided backward keeps until it computes the gradients of matrices.
        working_bytes: what its forward or its backward needs for a moment, besides what is kept.
        copied_bytes: under autocast, size of the copies in lower precision of the trained matrices that it multiplies by.
        frozen_copied_bytes: the same of frozen ones.
    """

    modules: tuple[str, ...]
    kind: str
    parameters: int
    parameter_bytes: int
    flops: float
    activation_bytes: float
    output_bytes: float
    plan_cost: float
    idle_parameters: int = 0
    trained_bytes: int | None = None
    unpacked_bytes: int = 0
    largest_unpacked: int = 0
    later_bytes: float = 0.0
    working_bytes: float = 0.0
    copied_bytes: int = 0
    frozen_copied_bytes: int = 0

    @property
    def trained(self) -> int:
        """Bytes of the parameters that are trained."""
        return self.parameter_bytes if self.trained_bytes is None else self.trained_bytes


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
        dtype: of weights and, but for autocast, activations.
        autocast: whether products are computed in bfloat16.
    """

    name: str
    units: tuple[UnitFacts, ...]
    tied_bytes: int
    untrainable: str | None
    batch: int
    time: int
    dtype: torch.dtype
    autocast: bool = False

    @property
    def computed(self) -> torch.dtype:
        """What products are computed in."""
        return COMPUTED if self.autocast else self.dtype

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
    def active_parameters(self) -> int:
        """Of the whole model, but for the experts that a token does not pass."""
        return self.parameters - sum(unit.idle_parameters for unit in self.units)

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
                later_bytes=unit.later_bytes * factor,
                working_bytes=unit.working_bytes * factor,
                output_bytes=unit.output_bytes * factor,
            )
            for unit in self.units
        )
        return replace(self, units=units, batch=batch)


def model_facts(
    config: PretrainedConfig,
    batch: int,
    time: int,
    dtype: torch.dtype = torch.float32,
    lora_rank: int | None = None,
    quantization: str | None = None,
    autocast: bool = False,
) -> ModelFacts:
    """Counts for a causal language model of this configuration.

    Args:
        config: of the model.
        batch: rows of a micro-batch.
        time: tokens per row.
        dtype: of weights and activations.
        lora_rank: of adapters on all linear modules of the layers, which alone are trained; None to train the model.
        quantization: how matrices below adapters are packed, one of `packing.KINDS`; None for not at all.
        autocast: whether products are computed in bfloat16 (`bf16=True`).

    Raises:
        UnsupportedModelError: no causal language model, not a row of layers, or it does not run without data.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"model_type {config.model_type!r} is no causal language model of Transformers")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # whatever a model does with a configuration that contradicts itself
        raise UnsupportedModelError(
            f"no {config.model_type} model can be made of this configuration ({type(error).__name__}: {error})"
        ) from error
    if getattr(config, "mem_len", 0):
        raise UnsupportedModelError(
            f"{type(model).__name__} attends to a memory of mem_len={config.mem_len}, which is not counted; plan it without "
            "(--config_overrides mem_len=0: the layers weigh as much beside each other), or train with device_map=auto"
        )
    packed = {} if quantization is None else packed_sizes(model, quantization)
    if lora_rank is not None:
        model = lora_on_meta(model, lora_rank)
    try:
        plan = outline(model)
    except UnsupportedModelError:
        raise
    except Exception as error:  # an architecture of another make
        raise UnsupportedModelError(
            f"{type(model).__name__} is no plain row of layers and can't be planned ({type(error).__name__}: {error})"
        ) from error
    if not any(unit.kind == "layer" for unit in plan.units):
        raise UnsupportedModelError(f"{type(model).__name__} has no layers in this configuration; nothing can be split")
    seen: set[int] = set()
    owned = []
    for unit in plan.units:
        parameters = {id(p): p for name in unit.modules for p in model.get_submodule(name).parameters()}
        # A frozen matrix that embedding and head share is on both of their devices.
        owned.append([p for key, p in parameters.items() if key not in seen or not p.requires_grad])
        seen |= parameters.keys()
    if missing := [name for name, p in model.named_parameters() if id(p) not in seen]:
        raise UnsupportedModelError(
            f"{type(model).__name__} has parameters that are neither in its embedding, its layers nor its head "
            f"({missing[0]}, ...), so it is no plain row of layers and can't be planned"
        )
    tied = [model.get_parameter(name) for name in plan.tied_names]
    asleep = [
        sum(some.idle for name in unit.modules for some in find_experts(model.get_submodule(name), config))
        for unit in plan.units
    ]
    copied = [_copied_bytes(model, unit.modules, packed) if autocast else (0, 0) for unit in plan.units]
    try:
        parts = trace(model, [unit.modules[0] for unit in plan.units if unit.kind == "layer"], batch, time, autocast)
    except Exception as error:  # whatever a model does that needs data
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on the meta device ({type(error).__name__}: {error}), so its costs "
            "can't be counted"
        ) from error
    before, *layers, after = parts
    # What comes after the layers is one part: the head, which includes the loss; a norm before it counts nothing.
    counted = [before, *layers, *[Part()] * (len(plan.units) - len(layers) - 2), after]
    units = tuple(
        UnitFacts(
            unit.modules,
            unit.kind,
            sum(p.numel() for p in parameters),
            sum(packed[id(p)].bytes if id(p) in packed else p.numel() * p.element_size() for p in parameters),
            part.flops,
            part.kept_bytes,
            float(layers[0].output_size * dtype.itemsize),
            unit.cost,
            idle,
            None if lora_rank is None else sum(p.numel() * p.element_size() for p in parameters if p.requires_grad),
            sum(p.numel() * dtype.itemsize for p in parameters if id(p) in packed),
            max((p.numel() * dtype.itemsize for p in parameters if id(p) in packed), default=0),
            part.later_bytes,
            part.working_bytes,
            *lowered,
        )
        for unit, parameters, part, idle, lowered in zip(plan.units, owned, counted, asleep, copied, strict=True)
    )
    if not any(part.flops for part in layers):
        raise UnsupportedModelError(f"the layers of this {type(model).__name__} compute nothing; check its sizes")
    tied_bytes = sum(p.numel() * p.element_size() for p in tied)
    return ModelFacts(type(model).__name__, units, tied_bytes, plan.reason, batch, time, dtype, autocast)


def _copied_bytes(model: nn.Module, names: Sequence[str], packed: Collection[int]) -> tuple[int, int]:
    """Size, in lower precision, of the matrices of modules that are only multiplied by: of trained ones, and of frozen ones."""
    places = {place for place in multiplied(model) if place.startswith(tuple(f"{name}." for name in names))}
    found = {id(p): p for p in map(model.get_parameter, places) if p.dtype == torch.float32 and id(p) not in packed}
    sizes = {True: 0, False: 0}
    for parameter in found.values():
        sizes[parameter.requires_grad] += parameter.numel() * COMPUTED.itemsize
    return sizes[True], sizes[False]
