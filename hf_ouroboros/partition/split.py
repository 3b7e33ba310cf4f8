"""Model -> stages: units, device map, placement, and the check that the stages compose to the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import DeviceMapError
from .device_map import parse_device_map, plan_stages
from .families import Family, Memory, Targets, find_family
from .mapping import check_module_names
from .ownership import Owned, release_foreign
from .plan import StagePlan, StageRow, torch_device
from .self_check import compare_logits, sample_logits
from .stages import Stage
from .units import StageSpan, Unit


@dataclass(frozen=True)
class Home:
    """The one device of a plan that this process runs, where every device has a process of its own.

    Args:
        device_index: its index in the plan.
        device: the torch device behind it.
    """

    device_index: int
    device: torch.device


@dataclass(frozen=True)
class Partition:
    """A model split into stages.

    Args:
        model: the complete model; its parameters are the stages' parameters.
        stages: K stages in order, each on its device; those of other processes are on the meta device.
        plan: what is where.
        tied_names: full names of the matrices that stage 0 owns and the last stage uses too.
        home: what this process runs; None for everything.
    """

    model: PreTrainedModel
    stages: tuple[Stage, ...]
    plan: StagePlan
    tied_names: tuple[str, ...]
    home: Home | None = None

    def is_here(self, stage: int) -> bool:
        """Whether this process runs a stage."""
        return self.home is None or self.plan.placement[stage] == self.home.device_index

    @property
    def remembers(self) -> bool:
        """Whether layers remember a segment while they read the next one."""
        return self.stages[0].family.remembers(self.model.config)

    def evaluation_config(self, **options: int) -> PretrainedConfig:
        """The configuration with which stages evaluate.

        Raises:
            UnsupportedOptionError: the architecture has no such option.
        """
        config = self.model.config
        return self.stages[0].family.evaluation_config(config, **options) if options else config

    def owned(self, stage: int) -> dict[str, nn.Parameter]:
        """The parameters that belong to a stage, by their name in the model, in the model's order."""
        tied = {id(parameter) for parameter in self.tied.values()}
        return {
            name: parameter
            for name, parameter in self.stages[stage].named_parameters()
            if stage == 0 or id(parameter) not in tied
        }

    @property
    def tied(self) -> dict[str, nn.Parameter]:
        """The matrices that embedding and head share, by `tied_names`."""
        return {name: self.model.get_parameter(name) for name in self.tied_names}


def model_units(model: PreTrainedModel, family: Family) -> list[Unit]:
    """The model's units in execution order, with cost (multiply-adds per token) and bytes."""
    seen: set[int] = set()

    def unit(modules: Iterable[str], kind: str) -> Unit:
        modules = tuple(modules)
        parameters = [p for name in modules for p in model.get_submodule(name).parameters()]
        fresh = [p for p in parameters if id(p) not in seen]
        seen.update(id(p) for p in parameters)
        # An embedding is looked up, not multiplied: it costs next to nothing beside a layer.
        known = family.cost(model, modules[0])
        counted = sum(p.numel() for p in parameters if p.dim() > 1) if kind != "embedding" else 0
        cost = counted if known is None else known
        return Unit(modules, kind, float(cost), sum(p.numel() * p.element_size() for p in fresh))

    embedding = unit(family.embedding(model), "embedding")
    layers = [unit([name], "layer") for name in family.layers(model)]
    return [embedding, *layers, *(unit([name], "head") for name in family.head(model))]


def tied_parameter_names(model: PreTrainedModel, units: Sequence[Unit]) -> tuple[str, ...]:
    """Names, on the embedding side, of the matrices that embedding and head share."""
    head = {
        id(p) for u in units if u.kind == "head" for name in u.modules for p in model.get_submodule(name).parameters()
    }
    return tuple(
        f"{name}.{parameter_name}"
        for name in units[0].modules
        for parameter_name, parameter in model.get_submodule(name).named_parameters()
        if id(parameter) in head
    )


def split_model(
    model: PreTrainedModel,
    devices: Sequence[str],
    device_map: Any = "auto",
    num_stages: int | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
    delayed: bool = True,
    colocate: bool = False,
    check: bool = True,
    home: Home | None = None,
) -> Partition:
    """Splits a model into stages and puts each on its device.

    Args:
        model: a model of a supported architecture; dispatched by accelerate or not.
        devices: device names in worker order.
        device_map: any form that `plan_stages` takes; "auto" honours `model.hf_device_map`.
        num_stages: K; None for the default.
        max_memory: parameter bytes per device.
        delayed: whether the schedule delays gradients (for the plan's delay column).
        colocate: split as for all devices, but put every stage on the first one (for `schedule="reference"`).
        check: compare the composed stages' logits with the model's, where the model is complete.
        home: what this process runs; the parameters of all other stages go to the meta device. None for everything.

    Raises:
        UnsupportedModelError: unknown architecture, or stages that don't reproduce the model's logits.
        DeviceMapError: see `plan_stages`.
    """
    family = find_family(model)
    complete = not any(p.is_meta for p in model.parameters())
    if home is None and not complete:
        raise DeviceMapError("the model has parameters on the meta device (offloaded or not loaded); load its weights")
    dispatched = getattr(model, "hf_device_map", None)
    if device_map == "auto" and dispatched and len(set(map(str, dispatched.values()))) > 1:
        device_map = dispatched
    units = model_units(model, family)
    tied_names = tied_parameter_names(model, units)
    device_map = parse_device_map(device_map)
    if isinstance(device_map, Mapping):
        check_module_names(device_map, model)
    spans = plan_stages(device_map, units, devices, bool(tied_names), num_stages, max_memory)
    used = sorted({span.device for span in spans})
    num_workers = len(used)
    if home is not None and num_workers < len(devices):
        raise DeviceMapError(
            f"the device map uses {num_workers} of {len(devices)} devices, but every process is a device and needs a "
            f"stage; start {num_workers} processes per replica, or choose another device_map or num_stages"
        )
    if colocate:
        spans = [replace(span, device=0) for span in spans]
        used = [0]
    check = check and complete
    expected = sample_logits(model, lambda batch: model(**batch, use_cache=False).logits) if check else None
    remove_hook_from_submodules(model)
    if dispatched:
        del model.hf_device_map

    def build() -> tuple[Stage, ...]:
        return tuple(Stage(model, family, units, span, len(spans)).eval() for span in spans)

    stages = build()
    if home is not None:
        if check:  # while the weights of all stages are there
            compare_logits(expected, sample_logits(model, lambda batch: compose(stages, batch)), model)
        if replaced := release_foreign(model, ownership(units, spans, home.device_index)):
            raise DeviceMapError(
                f"{', '.join(replaced[:3])} can't be released in place: a view, a weak reference or an unfinished backward "
                "holds them; create the trainer before anything else uses the model's parameters"
            )
    for stage, span in zip(stages, spans, strict=True):
        if home is None:
            _place(stage, torch_device(devices[span.device]))
        elif span.device == home.device_index:
            _check_loaded(stage, model)
            _place(stage, home.device)
    tied = {id(model.get_parameter(name)) for name in tied_names}
    rows = []
    for span, stage in zip(spans, stages, strict=True):
        parameters = [p for p in stage.parameters() if span.index == 0 or id(p) not in tied]
        rows.append(
            StageRow(
                span.index,
                devices[span.device],
                tuple(name for unit in units[span.start : span.stop] for name in unit.modules),
                sum(unit.kind == "layer" for unit in units[span.start : span.stop]),
                len(spans) - 1 - span.index if delayed else 0,
                sum(p.numel() for p in parameters),
                sum(p.numel() * p.element_size() for p in parameters),
                sum(unit.cost for unit in units[span.start : span.stop]),
            )
        )
    plan = StagePlan(tuple(rows), tuple(devices[d] for d in used), bool(tied_names), num_workers)
    if check and home is None:
        compare_logits(expected, sample_logits(model, lambda batch: compose(stages, batch)), model)
    for stage in stages:
        stage.train(model.training)
    return Partition(model, stages, plan, tied_names, home)


def plan_ownership(
    model: PreTrainedModel,
    devices: Sequence[str],
    device_map: Any,
    num_stages: int | None,
    max_memory: Mapping[Any, int | str] | None,
    device_index: int,
) -> Owned:
    """Tells which parameters will be on a device when `split_model` splits this model, whose weights it does not need.

    Raises:
        UnsupportedModelError: unknown architecture.
        DeviceMapError: see `plan_stages`.
    """
    units = model_units(model, find_family(model))
    device_map = parse_device_map(device_map)
    if isinstance(device_map, Mapping):
        check_module_names(device_map, model)
    tied = bool(tied_parameter_names(model, units))
    return ownership(units, plan_stages(device_map, units, devices, tied, num_stages, max_memory), device_index)


def ownership(units: Sequence[Unit], spans: Sequence[StageSpan], device_index: int) -> Owned:
    """Tells for a parameter's name whether it belongs to a stage on a device."""
    modules = [
        f"{name}."
        for span in spans
        if span.device == device_index
        for unit in units[span.start : span.stop]
        for name in unit.modules
    ]
    return lambda name: any(name.startswith(module) for module in modules)


def _check_loaded(stage: Stage, model: PreTrainedModel) -> None:
    for name, parameter in stage.named_parameters():
        if parameter.is_meta:
            raise DeviceMapError(
                f"{name} of this {type(model).__name__} has no values, but stage {stage.index}, which needs it, is this "
                "process's; load the model with the same devices, device_map and num_stages as it is trained with"
            )


def compose(
    stages: Sequence[Stage],
    batch: dict[str, torch.Tensor],
    memories: Sequence[Memory | None] | None = None,
    targets: Targets | None = None,
) -> torch.Tensor:
    """Runs all stages in turn, as the unsplit model would, moving the batch and hidden state along.

    Args:
        stages: all of them, with weights.
        batch: what the family takes, e.g. `input_ids` [batch, time].
        memories: of each stage, as in `Stage.forward`; None for no memory.
        targets: as in `Stage.forward`, on any device.

    Returns:
        Logits [batch, time, vocabulary] on the last stage's device; with targets the loss.
    """
    hidden = None
    for stage, memory in zip(stages, memories or [None] * len(stages), strict=True):
        device = next(stage.parameters()).device
        given = hidden if hidden is None else hidden.to(device)
        last = to_device(targets, device) if stage.is_last and targets is not None else None
        hidden = stage(select(stage.family, batch, device), given, memory, last)
    return hidden


def to_device(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors among the values moved to a device, everything else as it is."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in values.items()}


def select(family: Family, batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """The part of a batch that stages compute with, on a device."""
    return {
        key: batch[key].to(device, non_blocking=True)
        for key in batch
        if key in family.batch_keys and batch[key] is not None
    }


def _place(stage: Stage, device: torch.device) -> None:
    for parameter in stage.parameters():
        if parameter.device != device:
            parameter.data = parameter.data.to(device)
    for module in stage.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
