"""What a run is between ticks, besides weights and optimizer: clocks, pending gradients, memories; for every schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import CheckpointError, CheckpointMismatchError
from ..partition import Memory, Partition
from ..partition.experts import find_experts
from ..schedules import names_where
from .loss_scale import ScaleState
from .pending import due_next
from .settings import EngineSettings

FORMAT = 4
NUMBERS = ("num_stages", "tied_gradient", "seed", "tick", "update", "delay_start")
Pending = dict[int, dict[int, dict[str, torch.Tensor]]]
"""{stage: {tick: {parameter name: gradient}}}: gradients that are known but not applied yet; with weights="now", what pending
backwards need instead (`pending.py`)."""


@dataclass
class RunState:
    """State of a settled run at an update boundary.

    Args:
        num_stages: K.
        tied_gradient: rule for the tied embedding's gradient.
        seed: seed of the dropout masks.
        tick: ticks so far.
        update: updates so far.
        delay_start: first tick whose gradients are delayed; None before the delays start.
        pending: gradients to come, or to be computed, [tick - d_k, tick) for each stage k.
        streams: {first column of a group: (number of its columns, its next segment)}.
        memories: {stage: {group: what the stage remembers of the group's last segment}}.
        weights: of late backwards, "then" or "now".
        starts: first unit of every stage; what stages have received belongs there.
        loss_scale: in float16; None without scaling.
    """

    num_stages: int
    tied_gradient: str
    seed: int
    tick: int
    update: int
    delay_start: int | None
    pending: Pending = field(default_factory=dict, repr=False)
    streams: dict[int, tuple[int, int]] = field(default_factory=dict)
    memories: dict[int, dict[int, Memory]] = field(default_factory=dict, repr=False)
    weights: str = "then"
    starts: list[int] = field(default_factory=list)
    loss_scale: ScaleState | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The pending gradients and memories by flat names, ready for safetensors."""
        memories = {
            f"memory.{stage}.{group}.{name}": tensor
            for stage, groups in self.memories.items()
            for group, memory in groups.items()
            for name, tensor in memory.items()
        }
        return memories | {
            f"pending.{stage}.{tick}.{name}": gradient
            for stage, ticks in self.pending.items()
            for tick, gradients in ticks.items()
            for name, gradient in gradients.items()
        }

    def meta(self) -> dict[str, Any]:
        """Everything else, ready for JSON."""
        numbers = {name: getattr(self, name) for name in NUMBERS}
        ticks = {str(stage): sorted(entries) for stage, entries in self.pending.items()}
        streams = {str(group): list(position) for group, position in self.streams.items()}
        rule: dict[str, Any] = {"weights": self.weights, "starts": list(self.starts)}
        if self.loss_scale is not None:
            rule["loss_scale"] = asdict(self.loss_scale)
        return {"format": FORMAT, **numbers, **rule, "pending_ticks": ticks, "streams": streams}

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> RunState:
        """Inverse of `meta()` and `tensors()`.

        Raises:
            CheckpointError: not a state of this format, or parts that don't belong together.
        """
        if not isinstance(meta, Mapping):
            raise CheckpointError(f"Ouroboros state is damaged: {type(meta).__name__} instead of a mapping")
        check_format(meta)
        try:
            pending: Pending = {
                int(stage): {int(tick): {} for tick in ticks} for stage, ticks in meta["pending_ticks"].items()
            }
            streams = {int(group): (int(width), int(segment)) for group, (width, segment) in meta["streams"].items()}
            memories: dict[int, dict[int, Memory]] = {stage: {group: {} for group in streams} for stage in pending}
            for key, tensor in tensors.items():
                kind, stage, number, name = key.split(".", 3)
                if kind == "memory":
                    memories[int(stage)][int(number)][name] = tensor
                elif kind == "pending":
                    pending[int(stage)][int(number)][name] = tensor
                else:
                    raise ValueError(f"unknown tensor {key}")
            for name in NUMBERS:
                if name != "tied_gradient" and not isinstance(meta[name], int):
                    if (name, meta[name]) != ("delay_start", None):
                        raise ValueError(f"{name} is {meta[name]!r}, not a whole number")
            weights, starts = str(meta.get("weights", "then")), [int(start) for start in meta.get("starts", ())]
            numbers = {name: meta[name] for name in NUMBERS}
            scale = ScaleState.read(meta["loss_scale"]) if "loss_scale" in meta else None
            return cls(
                **numbers,
                pending=pending,
                streams=streams,
                memories=memories,
                weights=weights,
                starts=starts,
                loss_scale=scale,
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"Ouroboros state is damaged: {type(error).__name__}: {error}") from error

    def check(self, partition: Partition, settings: EngineSettings, own_stages: Iterable[int] | None = None) -> None:
        """Refuses a state that can't be continued exactly by this run.

        Args:
            partition: the run's stages.
            settings: the run's settings.
            own_stages: the stages whose gradients this process needs; None for all.

        Raises:
            CheckpointMismatchError: other number of stages, split, tied-gradient rule, weights, or delays; memories of other
                layers.
        """
        stages = len(partition.stages)
        if self.num_stages != stages:
            raise CheckpointMismatchError(
                f"the checkpoint was written with {self.num_stages} stages, this run has {stages}; resume with "
                f"num_stages={self.num_stages}, or start anew from its weights (model_name_or_path)"
            )
        delayed = any(entries for entries in self.pending.values())
        if delayed and self.tied_gradient != settings.tied_gradient and partition.tied_names:
            raise CheckpointMismatchError(
                f"the checkpoint was written with tied_gradient={self.tied_gradient!r}, this run has "
                f"{settings.tied_gradient!r}"
            )
        if delayed and settings.is_synchronous(self.update):
            raise CheckpointMismatchError(
                "the checkpoint holds delayed gradients that are still to be applied, but this run has no delays "
                f"there (schedule={settings.schedule!r}, delay_warmup_steps={settings.delay_warmup_steps}); resume with "
                f"schedule {', '.join(names_where(lambda s: not s.is_synchronous))} and the same delay_warmup_steps"
            )
        if delayed and self.weights != settings.weights:
            raise CheckpointMismatchError(
                f"the checkpoint was written with weights={self.weights!r}, this run has {settings.weights!r}, which is another "
                f"update rule; resume with weights={self.weights!r}, or start anew from its weights (model_name_or_path)"
            )
        if delayed and self.weights == "now" and self.starts != starts_of(partition):
            raise CheckpointMismatchError(
                f"the checkpoint holds what stages that begin at units {self.starts} of the model have received, this run's begin "
                f"at {starts_of(partition)}; resume with the same device_map"
            )
        for stage in range(stages) if own_stages is None else own_stages:
            delay = stages - 1 - stage
            oldest = self.tick if self.delay_start is None else max(self.tick - delay, self.delay_start)
            entries = self.pending.get(stage, {})
            if sorted(entries) != list(range(oldest, self.tick)):
                raise CheckpointMismatchError(
                    f"the checkpoint's pending gradients of stage {stage} are of ticks {sorted(entries)}, expected "
                    f"{list(range(oldest, self.tick))}"
                )
            if self.weights == "now":
                self._check_inputs(partition, stage)
            else:
                self._check_gradients(partition, stage)
            self._check_memories(partition, stage)

    def _check_gradients(self, partition: Partition, stage: int) -> None:
        owned = partition.owned(stage)
        layers = partition.stages[stage].layers.values()
        experts = [some for layer in layers for some in find_experts(layer, partition.model.config)]
        rested = {id(p) for some in experts for p in some.parameters}  # an expert may get no token of a micro-batch
        trained = {name for name, p in owned.items() if p.requires_grad and id(p) not in rested}
        for tick, gradients in self.pending.get(stage, {}).items():
            for name, gradient in gradients.items():
                if name not in owned or gradient.shape != owned[name].shape:
                    raise CheckpointMismatchError(
                        f"the checkpoint has a pending gradient of {name!r} {tuple(gradient.shape)} for stage "
                        f"{stage}, which does not hold such a parameter; resume with the same device_map"
                    )
            if missing := trained - gradients.keys():
                raise CheckpointMismatchError(
                    f"the checkpoint has no pending gradient of {min(missing)!r} at tick {tick}, which stage {stage} "
                    "of this run trains; the file is incomplete, or resume with the same device_map and frozen layers"
                )

    def _check_inputs(self, partition: Partition, stage: int) -> None:
        entries, stages = self.pending.get(stage, {}), partition.stages
        if not entries:
            return
        following = stages[stage + 1]
        tied = {f"head.{n}": p for n, p in partition.tied.items() if p.requires_grad} if stage == 0 else {}
        needed = {"shape", "batch" if stage == 0 else "received"}
        due = due_next(entries, len(stages) - 1 - stage)
        for tick, tensors in entries.items():
            missing = needed - {name.partition(".")[0] for name in tensors}
            if tick == due and following.first_trained < following.start:
                missing |= {"gradient"} - {name.partition(".")[0] for name in tensors}
            missing |= {n for n, p in tied.items() if n not in tensors or tensors[n].shape != p.shape}
            if missing:
                raise CheckpointMismatchError(
                    f"the checkpoint has no {min(missing)} of tick {tick} for the pending backward of stage {stage}, or one of another "
                    "shape; the file is incomplete, or resume with the same model and frozen layers"
                )

    def _check_memories(self, partition: Partition, stage: int) -> None:
        names = set(partition.stages[stage].layer_names) if partition.remembers else set()
        groups = self.memories.get(stage, {})
        for group in sorted(groups.keys() | self.streams.keys()):
            memory, width = groups.get(group, {}), self.streams.get(group, (0, 0))[0]
            if memory.keys() - {"valid"} != names or any(tensor.shape[0] != width for tensor in memory.values()):
                raise CheckpointMismatchError(
                    f"the checkpoint's memories of stage {stage} for columns {group} to {group + width - 1} are not those "
                    f"of its layers ({', '.join(sorted(names)) or 'none has any'}); the file is incomplete, or resume with "
                    "the same device_map and mem_len"
                )


def starts_of(partition: Partition) -> list[int]:
    """The first unit of every stage."""
    return [stage.start for stage in partition.stages]


def check_format(meta: Mapping[str, Any]) -> None:
    """Refuses a state that another version wrote.

    Raises:
        CheckpointError: not a state of this format.
    """
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"Ouroboros state has format {meta.get('format')!r}, this version reads format {FORMAT}")
