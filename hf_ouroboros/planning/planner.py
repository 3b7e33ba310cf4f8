"""Costs of units on devices -> the contiguous split with the least busy busiest device that fits into memory.

What the engine's own `device_map="auto"` does is the same dynamic program over multiply-adds, which every process and
every resumed run counts alike. A plan by seconds comes as a device map in a file, because clocks differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import DeviceMapError
from ..partition.balance import Load, NoSplitError, best_counts
from ..partition.device_map import default_num_stages, default_placement
from ..schedules import SCHEDULES
from .hardware import GIB, DeviceKind
from .memory_model import MemoryOptions, StageMemory, memory_load, stage_memory, together
from .unit_facts import ModelFacts, UnitFacts


@dataclass(frozen=True)
class UnitTimes:
    """Seconds of one unit on one device: forward and backward of a micro-batch, and its share of a step."""

    forward: float
    backward: float
    step: float


@dataclass(frozen=True)
class PlannedDevice:
    """A device of a plan.

    Args:
        name: for tables.
        times: of every unit of the model, in execution order.
        memory: bytes that may be used; infinite where it does not matter.
    """

    name: str
    times: tuple[UnitTimes, ...]
    memory: float


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a plan; times in seconds, `step` once per update."""

    stage: int
    device: int
    units: tuple[UnitFacts, ...]
    delay: int
    forward: float
    backward: float
    step: float
    memory: StageMemory

    @property
    def layers(self) -> int:
        """How many of its units are layers."""
        return sum(unit.kind == "layer" for unit in self.units)


@dataclass(frozen=True)
class SplitPlan:
    """A split and what it takes."""

    facts: ModelFacts
    devices: tuple[PlannedDevice, ...]
    stages: tuple[PlannedStage, ...]
    options: MemoryOptions

    @property
    def placement(self) -> tuple[int, ...]:
        """Device of every stage."""
        return tuple(stage.device for stage in self.stages)

    @property
    def counts(self) -> tuple[int, ...]:
        """Layers of every stage."""
        return tuple(stage.layers for stage in self.stages)

    def memory_on(self, device: int) -> StageMemory:
        """What the stages of a device need, of which one is at work at a time."""
        return together([stage.memory for stage in self.stages if stage.device == device])

    def bytes_on(self, device: int) -> float:
        """The same, all in all."""
        return self.memory_on(device).total

    def device_map(self) -> dict[str, int]:
        """{module name: device index} in execution order, as `device_map` takes it."""
        return {name: stage.device for stage in self.stages for unit in stage.units for name in unit.modules}


def estimated(facts: ModelFacts, kind: DeviceKind, margin: float = 0.9) -> PlannedDevice:
    """A device that is not here, by its data sheet; of its memory, `margin` is used."""
    times = []
    for unit in facts.units:
        forward = kind.forward_seconds(unit, facts.computed)
        # The gradients of the inputs take a forward's time, those of the weights another one's.
        backward = forward * (1 + unit.trained / max(1, unit.parameter_bytes))
        times.append(UnitTimes(forward, backward, kind.step_seconds(unit)))
    return PlannedDevice(kind.name, tuple(times), kind.memory * margin)


def plan_split(
    facts: ModelFacts,
    devices: Sequence[PlannedDevice],
    options: MemoryOptions,
    num_stages: int | None = None,
    placement: Sequence[int] | None = None,
) -> SplitPlan:
    """The best contiguous split; exact for up to one more stage than devices.

    Args:
        facts: the model and its micro-batches.
        devices: in worker order.
        options: what decides about memory.
        num_stages: K; None for the default.
        placement: device of every stage; None for the engine's.

    Raises:
        DeviceMapError: more stages than layers, or it does not fit; then the message says what would.
    """
    stages = num_stages or min(default_num_stages(len(devices), facts.tied), facts.layers + 1)
    if placement is not None:
        stages = len(placement)
    if stages > facts.layers + 1:
        raise DeviceMapError(f"num_stages={stages} is more than the model's {facts.layers} layers and head")
    placement = placement or default_placement(stages, len(devices), facts.tied)
    try:
        counts = best_counts(
            placement,
            time_load(facts, devices, placement, options),
            memory_load(facts, stages, options),
            [device.memory for device in devices],
        )
    except NoSplitError:
        raise DeviceMapError(_what_would_fit(facts, devices, options, num_stages)) from None
    return assembled(facts, devices, placement, counts, options)


def time_load(
    facts: ModelFacts, devices: Sequence[PlannedDevice], placement: Sequence[int], options: MemoryOptions
) -> Load:
    """Seconds per micro-batch of every unit in every stage."""
    rows, fixed = [], []
    for k, device in enumerate(placement):
        last = k == len(placement) - 1
        replayed = options.replays and not last
        seconds = [
            t.forward * (1 + replayed) + t.backward + t.step / options.micro_batches for t in devices[device].times
        ]
        kinds = [unit.kind for unit in facts.units]
        rows.append([s for s, kind in zip(seconds, kinds, strict=True) if kind == "layer"])
        own = {"embedding": k == 0, "head": last, "layer": False}
        fixed.append(sum(s for s, kind in zip(seconds, kinds, strict=True) if own[kind]))
    return Load(rows, fixed)


def assembled(
    facts: ModelFacts,
    devices: Sequence[PlannedDevice],
    placement: Sequence[int],
    counts: Sequence[int],
    options: MemoryOptions,
) -> SplitPlan:
    """The plan of a split into so many layers per stage, each on its device."""
    position = next(i for i, unit in enumerate(facts.units) if unit.kind == "layer")
    stages = []
    for k, (device, count) in enumerate(zip(placement, counts, strict=True)):
        last = k == len(counts) - 1
        start = 0 if k == 0 else position
        position += count
        stop = len(facts.units) if last else position
        times = devices[device].times[start:stop]
        forward = sum(t.forward for t in times)
        replayed = forward if options.replays and not last else 0.0
        units = facts.units[start:stop]
        stages.append(
            PlannedStage(
                k,
                device,
                units,
                SCHEDULES[options.schedule].delay(k, len(counts)),
                forward,
                replayed + sum(t.backward for t in times),
                sum(t.step for t in times),
                stage_memory(facts, units, k, len(counts), options),
            )
        )
    return SplitPlan(facts, tuple(devices), tuple(stages), options)


# ---- when nothing fits ----


def _what_would_fit(
    facts: ModelFacts, devices: Sequence[PlannedDevice], options: MemoryOptions, num_stages: int | None
) -> str:
    """The need of the most even split by memory, and the first change of each sort that makes room."""
    fullest, need = _fullest(facts, devices, options, num_stages)
    text = [
        f"{facts.name} does not fit into {len(devices)} device{'s' if len(devices) > 1 else ''} with micro-batches of "
        f"{facts.batch} x {facts.time} tokens: even the split with the most even memory needs {need / GIB:.1f} GiB on "
        f"device {fullest} ({devices[fullest].name}), where {devices[fullest].memory / GIB:.1f} GiB may be used."
    ]
    ways = []
    recomputed = replace(options, recompute=True)
    recompute_helps = not options.replays and _fits(facts, devices, recomputed, num_stages)
    if recompute_helps:
        need = _fullest(facts, devices, recomputed, num_stages)[1]
        ways.append(f"recompute ({need / GIB:.1f} GiB)")
    for batch in _halves(facts.batch):
        smaller = facts.for_batch(batch)
        if _fits(smaller, devices, options, num_stages):
            need = _fullest(smaller, devices, options, num_stages)[1]
            ways.append(f"micro-batches of {batch} row{'s' if batch > 1 else ''} ({need / GIB:.1f} GiB)")
            break
    most = min(64, int(1e8 / (facts.layers + 1) ** 3))  # a longer search than a user's patience
    for more in (options,) if recompute_helps or options.replays else (options, recomputed):
        found = next(
            (n for n in range(len(devices) + 1, most + 1) if _fits(facts, _more(devices, n), more, None)), None
        )
        if found is not None:
            ways.append(f"{found} devices{'' if more is options else ' with recompute'}")
            break
    smallest = facts.for_batch(1)
    if not ways and _fits(smallest, devices, recomputed, num_stages):
        ways.append("recompute together with micro-batches of 1 row")
    text.append(
        f"It would fit with {', or '.join(ways)}."
        if ways
        else f"Nothing makes room on up to {max(most, len(devices))} such devices."
    )
    return " ".join(text)


def _halves(batch: int) -> list[int]:
    sizes = []
    while batch > 1:
        batch //= 2
        sizes.append(batch)
    return sizes


def _more(devices: Sequence[PlannedDevice], count: int) -> list[PlannedDevice]:
    """Further devices like the last one."""
    return [*devices, *[devices[-1]] * (count - len(devices))]


def _fits(facts: ModelFacts, devices: Sequence[PlannedDevice], options: MemoryOptions, num_stages: int | None) -> bool:
    """Whether some split does."""
    stages = num_stages or default_num_stages(len(devices), facts.tied)
    if stages > facts.layers + 1:
        return False
    device, need = _fullest(facts, devices, options, stages)
    return need <= devices[device].memory


def _fullest(
    facts: ModelFacts, devices: Sequence[PlannedDevice], options: MemoryOptions, num_stages: int | None
) -> tuple[int, float]:
    """The fullest device, relative to its memory, and its need under the split that fills it least."""
    stages = num_stages or min(default_num_stages(len(devices), facts.tied), facts.layers + 1)
    placement = default_placement(stages, len(devices), facts.tied)
    memory = memory_load(facts, stages, options)
    room = [devices[d].memory for d in placement]
    relative = Load(
        [[size / r for size in row] for row, r in zip(memory.layers, room, strict=True)],
        [size / r for size, r in zip(memory.fixed, room, strict=True)],
    )
    plan = assembled(facts, devices, placement, best_counts(placement, relative), options)
    device = max(set(placement), key=lambda d: plan.bytes_on(d) / devices[d].memory)
    return device, plan.bytes_on(device)
