"""How many bytes a stage needs on its device: weights and their versions, gradients, optimizer, activations.

    stage k of K, delay d = K-1-k ticks, M ticks per update     delayed schedules    1f1b             zero_bubble
    micro-batches in flight, at most                            d + 1                min(M, d + 1)    min(M, 2K - 1)
    weight versions, the newest included                        1 + ceil(d / M)      1                1
    gradients: the update's sum, and those of one backward      2                    2                2
    output-side gradients of a tied matrix (last stage)         K                    K, at most M     min(M, 2K - 1)

A divided backward, that of all stages but the first under zero_bubble, keeps activations until the gradients of the weights are
computed, and with them those that arrive where weights join; recompute=True makes no difference then.
With weights="now" delayed schedules keep inputs, as with recompute=True, and one weight version; of a tied matrix also those that the
last stage is still to use.
What a schedule keeps is in its record (`schedules/records.py`). Versions, gradients and optimizer are of the parameters that are trained. Of packed matrices, the largest is there unpacked,
beside the activations. Buffers of kernels and of the allocator are not counted: leave a margin.
"""

from __future__ import annotations

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

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.versions + self.gradients + self.optimizer + self.activations


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
    kept = sum(unit.activation_bytes for unit in units)
    flying = ticks_in_flight(stage, num_stages, options)
    last = stage == num_stages - 1
    if SCHEDULES[options.schedule].divides_backward and stage > 0:
        kept += sum(unit.arrival_bytes for unit in units)
    elif options.replays and not last:
        inputs = 0.0 if stage == 0 else units[0].output_bytes
        kept, flying = kept + flying * inputs, 1
    tied = facts.tied_bytes * ticks_in_flight(0, num_stages, options) if last and num_stages > 1 else 0
    versions = trained * old_versions(stage, num_stages, options)
    if options.replays_newest and stage == 0:
        versions += facts.tied_bytes * _lent_versions(stage, num_stages, options)
    return StageMemory(
        weights,
        versions,
        2 * trained + tied,
        trained * OPTIMIZERS[options.optimizer],
        kept * flying + max((unit.largest_unpacked for unit in units), default=0),
    )


def memory_load(facts: ModelFacts, num_stages: int, options: MemoryOptions) -> Load:
    """The same as a sum over layers, for `best_counts`."""
    layers = [unit for unit in facts.units if unit.kind == "layer"]
    first = [unit for unit in facts.units if unit.kind == "embedding"]
    after = [unit for unit in facts.units if unit.kind == "head"]
    empty = [stage_memory(facts, layers[:1], k, num_stages, options).total for k in range(num_stages)]
    rows, fixed = [], []
    for k in range(num_stages):
        # The part that every stage has once (inputs kept, tied gradients) is what a second layer does not add.
        row = [_added(facts, unit, k, num_stages, options) for unit in layers]
        own = empty[k] - row[0]
        ends = [*(first if k == 0 else []), *(after if k == num_stages - 1 else [])]
        rows.append(row)
        fixed.append(own + sum(_added(facts, unit, k, num_stages, options) for unit in ends))
    return Load(rows, fixed)


def _added(facts: ModelFacts, unit: UnitFacts, stage: int, num_stages: int, options: MemoryOptions) -> float:
    """What one more unit adds to a stage that has one."""
    two = stage_memory(facts, [unit, unit], stage, num_stages, options).total
    return two - stage_memory(facts, [unit], stage, num_stages, options).total
