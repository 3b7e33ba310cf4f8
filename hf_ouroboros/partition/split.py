"""Model -> stages: units, device map, placement, and the check that the stages compose to the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import DeviceMapError, UnsupportedModelError
from .compiled import Compilation
from .device_map import parse_device_map, plan_stages, planned_stages
from .dissection import unchanged
from .families import find_family
from .mapping import check_module_names
from .meta import call_options, logits_of
from .module_hooks import carry_hooks
from .ownership import Owned, check_each_owned_once, release_foreign
from .packed import packed_linears, sizes
from .self_check import Run, Sample, compare, take_sample
from .stage_plan import StagePlan, StageRow, torch_device
from .stages import Stage, compose
from .trained import copy_shared, refresh, shared_parameter_names
from .units import StageSpan, Unit

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class OwnDevice:
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
        units: all units of the model.
        spans: which of them are which stage's.
        own_device: what this process runs; None for everything.
        copies: (a frozen parameter of the model, its copy on the last stage's device).
    """

    model: PreTrainedModel
    stages: tuple[Stage, ...]
    plan: StagePlan
    tied_names: tuple[str, ...]
    units: tuple[Unit, ...]
    spans: tuple[StageSpan, ...]
    own_device: OwnDevice | None = None
    copies: tuple[tuple[nn.Parameter, nn.Parameter], ...] = ()

    def is_here(self, stage: int) -> bool:
        """Whether this process runs a stage."""
        return self.own_device is None or self.plan.placement[stage] == self.own_device.device_index

    @property
    def has_last_stage(self) -> bool:
        """Whether this process runs the last stage, and with it has logits and losses."""
        return self.is_here(self.plan.num_stages - 1)

    def carry_hooks(self) -> None:
        """Lets the stages call the hooks that a script has put on modules by now; see `module_hooks.carry_hooks`.

        Raises:
            UnsupportedModelError, UnsupportedOptionError: hooks, or options of the configuration, that stages don't have.
        """
        for stage in self.stages:
            stage.check_config()
        carry_hooks(self.model, self.stages, self.units, self.spans)

    def compile_layers(self, compilation: Compilation | None) -> None:
        """Lets the layers of the stages that are here run compiled, or as they are.

        Raises:
            UnsupportedModelError: they can't be compiled.
        """
        if compilation is not None and any(packed_linears(self.model)):
            raise UnsupportedModelError(
                "torch_compile with a quantized model: its library's kernels are not compiled; leave it off"
            )
        for k, stage in enumerate(self.stages):
            if compilation is None or not self.is_here(k):
                stage.compiles = False
            else:
                stage.compile_layers(compilation)

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

    @property
    def device_of_loss(self) -> torch.device:
        """Where the last stage is; in a process without it, this process's device."""
        return self.stages[-1].device if self.own_device is None else self.own_device.device

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


def tied_parameter_names(model: PreTrainedModel, units: Sequence[Unit]) -> tuple[str, ...]:
    """Names, on the embedding side, of the matrices that embedding and head share and train."""
    return tuple(n for n in shared_parameter_names(model, units) if model.get_parameter(n).requires_grad)


def split_model(
    model: PreTrainedModel,
    devices: Sequence[str],
    device_map: Any = "auto",
    num_stages: int | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
    delayed: bool = True,
    colocate: bool = False,
    check: bool = True,
    own_device: OwnDevice | None = None,
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
        own_device: what this process runs; the parameters of all other stages go to the meta device. None for everything.

    Raises:
        UnsupportedModelError: unknown architecture, or stages that don't reproduce the model's logits.
        DeviceMapError: see `plan_stages`.
    """
    family = find_family(model)
    complete = not any(p.is_meta for p in model.parameters())
    if own_device is None and not complete:
        raise DeviceMapError("the model has parameters on the meta device (offloaded or not loaded); load its weights")
    dispatched = getattr(model, "hf_device_map", None)
    if device_map == "auto" and dispatched and len(set(map(str, dispatched.values()))) > 1:
        device_map = dispatched
    units = family.units(model)
    tied_names = tied_parameter_names(model, units)
    device_map = parse_device_map(device_map)
    if isinstance(device_map, Mapping):
        check_module_names(device_map, model)
    planned = planned_stages(device_map, units, devices, bool(tied_names), num_stages, max_memory)
    spans = planned.spans
    if planned.reason:
        logger.info(planned.reason)
    used = sorted({span.device for span in spans})
    num_workers = len(used)
    if own_device is not None and num_workers < len(devices):
        raise DeviceMapError(
            f"the device map uses {num_workers} of {len(devices)} devices, but every process is a device and needs a "
            f"stage; start {num_workers} processes per replica, or choose another device_map or num_stages"
        )
    if colocate:
        spans = [replace(span, device=0) for span in spans]
        used = [0]
    check = check and complete
    options = call_options(model)
    expected = None
    # Random numbers of two kinds of devices are not the same.
    training = family.draws_in_turn and all(p.device.type == "cpu" for p in model.parameters())
    training &= (
        own_device.device.type == "cpu" if own_device is not None else all(name.startswith("cpu") for name in devices)
    )
    if check:
        expected = _sample(model, training, "it does not run", lambda batch: logits_of(model(**batch, **options)))
    remove_hook_from_submodules(model)
    if dispatched:
        del model.hf_device_map

    def build() -> tuple[Stage, ...]:
        with unchanged(model):
            return tuple(family.make_stage(model, units, span, len(spans)).eval() for span in spans)

    stages = build()
    carry_hooks(model, stages, units, spans)
    if own_device is not None:
        if expected is not None:  # while the weights of all stages are there
            compare(expected, _sample_stages(model, training, stages), model)
        if replaced := release_foreign(model, ownership(units, spans, own_device.device_index)):
            raise DeviceMapError(
                f"{', '.join(replaced[:3])} can't be released in place: a view, a weak reference or an unfinished backward "
                "holds them; create the trainer before anything else uses the model's parameters"
            )
    copies = []
    if own_device is None:
        places = [torch_device(devices[span.device]) for span in spans]
        copies = copy_shared(stages, places, [model.get_parameter(name) for name in tied_names])
    for stage, span in zip(stages, spans, strict=True):
        if own_device is None:
            stage.place(torch_device(devices[span.device]))
        elif span.device == own_device.device_index:
            _check_loaded(stage, model)
            stage.place(own_device.device)
    tied = {id(model.get_parameter(name)) for name in tied_names}
    rows = []
    real = sizes((p for stage in stages for p in stage.parameters()), model)
    for span, stage in zip(spans, stages, strict=True):
        parameters = [p for p in stage.parameters() if span.index == 0 or id(p) not in tied]
        rows.append(
            StageRow(
                span.index,
                devices[span.device],
                tuple(name for unit in units[span.start : span.stop] for name in unit.modules),
                sum(unit.kind == "layer" for unit in units[span.start : span.stop]),
                len(spans) - 1 - span.index if delayed else 0,
                sum(real[id(p)].elements for p in parameters),
                sum(real[id(p)].bytes for p in parameters),
                sum(unit.cost for unit in units[span.start : span.stop]),
            )
        )
    plan = StagePlan(tuple(rows), tuple(devices[d] for d in used), bool(tied_names), num_workers, planned.reason)
    if expected is not None and own_device is None:
        compare(expected, _sample_stages(model, training, stages), model)
    for stage in stages:
        stage.train(model.training)
    partition = Partition(model, stages, plan, tied_names, tuple(units), tuple(spans), own_device, tuple(copies))
    check_each_owned_once(model, [partition.owned(k) for k in range(len(stages))])
    return refresh(partition)


def _sample(model: PreTrainedModel, training: bool, failing: str, run: Run) -> Sample:
    try:
        return take_sample(model, frozenset(inspect.signature(model.forward).parameters), training, run)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a model's forward does that needs more than token ids
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be split into stages: {failing} on a few tokens "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _sample_stages(model: PreTrainedModel, training: bool, stages: Sequence[Stage]) -> Sample:
    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        for stage in stages:
            stage.train(model.training)
        return compose(stages, batch)

    return _sample(model, training, "its stages do not run", run)


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
    units = find_family(model).units(model)
    device_map = parse_device_map(device_map)
    if isinstance(device_map, Mapping):
        check_module_names(device_map, model)
    tied = bool(tied_parameter_names(model, units))
    return ownership(units, plan_stages(device_map, units, devices, tied, num_stages, max_memory), device_index)


def ownership(units: Sequence[Unit], spans: Sequence[StageSpan], device_index: int) -> Owned:
    """Tells for a parameter's name whether it belongs to a stage on a device."""
    parts = [
        f"{name}."
        for span in spans
        if span.device == device_index
        for unit in units[span.start : span.stop]
        for name in unit.modules
    ]
    return lambda name: f"{name}.".startswith(tuple(parts))


def _check_loaded(stage: Stage, model: PreTrainedModel) -> None:
    for name, parameter in stage.named_parameters():
        if parameter.is_meta:
            raise DeviceMapError(
                f"{name} of this {type(model).__name__} has no values, but stage {stage.index}, which needs it, is this "
                "process's; load the model with the same devices, device_map and num_stages as it is trained with, and "
                "frozen=True if it is to be frozen"
            )
