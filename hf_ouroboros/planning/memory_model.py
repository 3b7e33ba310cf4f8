"""How many bytes a stage needs on its device: weights and their versions, gradients, optimizer, activations.

    stage k of K, delay d = K-1-k ticks, M ticks per update     delayed schedules    1f1b             zero_bubble
    micro-batches in flight, at most                            d + 1                min(M, d + 1)    min(M, 2K - 1)
    weight versions, the newest included                        1 + ceil(d / M)      1                1
    gradients: the update's sum, to which a backward adds       1                    1                1
    output-side gradients of a tied matrix (last stage)         K - 1, lockstep: K   min(M, K - 1)    min(M, K - 1)

With K = 2 it is two output-side gradients (one under zero_bubble), and under zero_bubble often fewer: what waits is what the
program of the device shared by the first and the last stage makes wait (`Schedule.output_sides`), whatever the stages' costs.
A divided backward, that of all stages but the first under zero_bubble, keeps what the gradients of matrices are computed from: what
they were multiplied with, and the gradients that arrive there. Either that or activations are counted, whichever is more; the last
stage has activations of one micro-batch only.
With weights="now" delayed schedules keep inputs, as with recompute=True, and one weight version; of a tied matrix also those that the
last stage is still to use.
What a schedule keeps is in its record (`schedules/records.py`). Versions, gradients and optimizer are of the parameters that are
trained. Under autocast every version of a matrix that is only multiplied by is a copy in bfloat16, beside the newest one in float32;
of a frozen one there is one copy for ever. The last stage, and stages that replay, have such copies in the graph of a micro-batch only.
A single stage has the gradients of a backward besides, as scripts see them. Gradients that come while activations or older weights
go are counted as far as they are larger than these (`_gradients`).

Working memory is there for a moment: what the largest part of a stage computes with in its forward or backward beside what is
kept, and the largest of the packed matrices, unpacked; of the stages of one device, one at a time. Messages between processes stay
until it is known that they have arrived (`processes/channels.py`). Buffers inside of kernels and of the allocator are not counted: leave a margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..partition.balance import Load
from ..schedules import DEFAULT, SCHEDULES
from .unit_facts import ModelFacts, UnitFacts

# Bytes of optimizer state per byte of parameters.
OPTIMIZERS = {"adamw": 2.0, "momentum": 1.0, "sgd": 0.0}


@dataclass(frozen=True)
class MemoryOptions:
    """What of a run decides about its memory.

    Args:
        schedule: one of `SCHEDULES` that uses devices.
        micro_batches: M, ticks per update.
        recompute: keep only the inputs of stages.
        optimizer: one of `OPTIMIZERS`.
        weights: of late backwards, "then" or "now".
    """

    schedule: str = DEFAULT
    micro_batches: int = 1
    recompute: bool = False
    optimizer: str = "adamw"
    weights: str = "then"

    @property
    def replays_newest(self) -> bool:
        """Whether late backwards replay their forward with the newest weights."""
        return self.weights == "now" and not SCHEDULES[self.schedule].is_synchronous

    @property
    def replays(self) -> bool:
        """Whether all stages but the last keep their inputs only."""
        return self.recompute or self.replays_newest


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a stage needs on its device."""

    weights: float
    versions: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    messages: float

    @property
    def total(self) -> float:
        """All together."""
        return sum(vars(self).values())


def together(stages: Sequence[StageMemory]) -> StageMemory:
    """What stages on one device need; working memory is for the one that is at work."""
    sums = {part: math.fsum(getattr(stage, part) for stage in stages) for part in StageMemory.__annotations__}
    return StageMemory(**(sums | {"working": max((stage.working for stage in stages), default=0.0)}))


def ticks_in_flight(stage: int, num_stages: int, options: MemoryOptions) -> int:
    """Most micro-batches between forward and backward in a stage."""
    return SCHEDULES[options.schedule].in_flight(stage, num_stages, options.micro_batches)


def old_versions(stage: int, num_stages: int, options: MemoryOptions) -> int:
    """Copies of the weights that pending backwards need besides the newest ones."""
    return 0 if options.replays_newest else _lent_versions(stage, num_stages, options)


def _lent_versions(stage: int, num_stages: int, options: MemoryOptions) -> int:
    """The same of tied matrices, of which the last stage needs the version of the first one."""
    return SCHEDULES[options.schedule].old_versions(stage, num_stages, options.micro_batches)


def stage_memory(
    facts: ModelFacts, units: Sequence[UnitFacts], stage: int, num_stages: int, options: MemoryOptions
) -> StageMemory:
    """What a stage with these units needs.

    Args:
        facts: the model.
        units: the stage's.
        stage: its index.
        num_stages: K.
        options: of the run.
    """
    weights = float(sum(unit.parameter_bytes for unit in units))
    trained = float(sum(unit.trained for unit in units))
    last = stage == num_stages - 1
    waiting = SCHEDULES[options.schedule].output_sides(num_stages, options.micro_batches)
    tied = facts.tied_bytes * waiting if last and num_stages > 1 else 0
    # Who shares no copies has one graph at a time.
    versions = float(sum(unit.copied_bytes + unit.frozen_copied_bytes for unit in units))
    versions += old_versions(stage, num_stages, options) * sum(_version(unit, options) for unit in units)
    if options.replays_newest and stage == 0:
        versions += facts.tied_bytes * _lent_versions(stage, num_stages, options)
    sets = 2 if num_stages == 1 and options.micro_batches > 1 else 1
    return StageMemory(
        weights,
        versions,
        sets * sum(_gradients(unit, stage, num_stages, options) for unit in units) + tied,
        trained * OPTIMIZERS[options.optimizer],
        _kept(units, stage, num_stages, options),
        max(map(_working, units)),
        _messages(units, stage, num_stages, options),
    )


def _kept(units: Sequence[UnitFacts], stage: int, num_stages: int, options: MemoryOptions) -> float:
    """What a stage keeps of the micro-batches in flight."""
    flying, last = ticks_in_flight(stage, num_stages, options), stage == num_stages - 1
    is_divided = SCHEDULES[options.schedule].divides_backward and stage > 0
    laters = [unit.later_bytes if is_divided else 0.0 for unit in units]
    # While the first part of a backward goes through a unit, one comes and the other one goes.
    graph = sum(max(unit.activation_bytes, later) for unit, later in zip(units, laters, strict=True))
    if options.replays and not last:
        inputs = 0.0 if stage == 0 else units[0].output_bytes
        return graph + flying * inputs + (flying - 1) * sum(laters)
    if is_divided and last:  # the gradient of its input comes right after its forward
        return graph + (flying - 1) * sum(laters)
    return flying * graph


def _version(unit: UnitFacts, options: MemoryOptions) -> float:
    """An older version; a replay makes copies in lower precision anew."""
    return unit.trained - (0 if options.replays else unit.copied_bytes)


def _gradients(unit: UnitFacts, stage: int, num_stages: int, options: MemoryOptions) -> float:
    """Gradients of an update, as far as they are larger than what is let go while they come.

    That is the activations of a backward, if it is the only one of its update. If the first backward of an update is the last one
    with the oldest weights, it lets go of those, too, and there are never all of the three.
    """
    delay, micro_batches = SCHEDULES[options.schedule].delay(stage, num_stages), options.micro_batches
    if micro_batches == 1:
        return max(0.0, unit.trained - unit.activation_bytes)
    if old_versions(stage, num_stages, options) and (delay - 1) % micro_batches == 0:
        return max(0.0, unit.trained - min(_version(unit, options), unit.activation_bytes))
    return float(unit.trained)


def _working(unit: UnitFacts) -> float:
    return unit.working_bytes + unit.largest_unpacked


def _messages(units: Sequence[UnitFacts], stage: int, num_stages: int, options: MemoryOptions) -> float:
    """What a stage has put out, which it needs for its backward or gloo still holds; gradients sent, and the one received."""
    size = units[0].output_bytes
    sent = num_stages + 2
    hidden = max(sent, ticks_in_flight(stage, num_stages, options)) if stage < num_stages - 1 else 0
    return size * (hidden + (sent + 1 if stage > 0 else 0))


def memory_load(facts: ModelFacts, num_stages: int, options: MemoryOptions) -> Load:
    """The same as a sum over layers, for `best_counts`."""
    layers = [unit for unit in facts.units if unit.kind == "layer"]
    first = [unit for unit in facts.units if unit.kind == "embedding"]
    after = [unit for unit in facts.units if unit.kind == "head"]
    largest = max(range(len(layers)), key=lambda i: _working(layers[i]))
    rows, fixed = [], []
    for k in range(num_stages):
        # The part that every stage has once (inputs kept, tied gradients, working memory) is what a second layer does not add.
        row = [_added(facts, unit, k, num_stages, options) for unit in layers]
        own = [*(first if k == 0 else []), layers[largest], *(after if k == num_stages - 1 else [])]
        rows.append(row)
        fixed.append(stage_memory(facts, own, k, num_stages, options).total - row[largest])
    return Load(rows, fixed)


def _added(facts: ModelFacts, unit: UnitFacts, stage: int, num_stages: int, options: MemoryOptions) -> float:
    """What one more unit adds to a stage that has one."""
    two = stage_memory(facts, [unit, unit], stage, num_stages, options).total
    return two - stage_memory(facts, [unit], stage, num_stages, options).total
