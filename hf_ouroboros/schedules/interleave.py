"""How a device that holds several stages interleaves them: chosen by simulation from the stages' costs, then fixed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from .beats import found_beats
from .clock import Clock, Pause, Slot
from .instructions import Backward, Forward, Instruction, Program
from .programs import Beat, beat_program, has_simple_devices, lockstep_program, stages_by_device
from .replay import Deadlock, Task, prepare, run


def lockstep_programs(
    placement: Sequence[int],
    forward_costs: Sequence[float],
    backward_costs: Sequence[float],
    micro_batches: int,
    exchange: bool,
) -> list[Program]:
    """All devices in step, whatever the costs; see `device_programs`."""
    return [lockstep_program(stages, len(placement), exchange) for stages in stages_by_device(placement)]


def dataflow_programs(
    placement: Sequence[int],
    forward_costs: Sequence[float],
    backward_costs: Sequence[float],
    micro_batches: int,
    exchange: bool,
    drained: bool = False,
) -> list[Program]:
    """Every stage in its own order, those of one device interleaved as the simulation finds best; see `device_programs`.

    Args:
        placement, forward_costs, backward_costs, micro_batches, exchange: as there.
        drained: whether the updates that are simulated are synchronous.
    """
    num_stages = len(placement)
    stages_of = stages_by_device(placement)
    duration = _durations(forward_costs, backward_costs)
    slots = sample_slots(num_stages, micro_batches, drained)
    prepared: dict[tuple[tuple[int, int], ...], tuple[Program, list[Task]]] = {}  # most devices often do the same

    def program_and_tasks(device: int, beat: Beat) -> tuple[Program, list[Task]]:
        if (key := tuple(beat)) not in prepared:
            program = beat_program(beat, num_stages, exchange)
            prepared[key] = program, prepare(program(slots), device, placement, duration)
        return prepared[key]

    spread = (
        [_late_first(offsets, stages) for stages in stages_of]
        for offsets in candidate_offsets(num_stages, most=max(len(stages) for stages in stages_of))
    )
    # Offsets are enough for simple devices.
    listed = () if has_simple_devices(stages_of) else found_beats(placement, forward_costs, backward_costs)
    best: tuple[float, list[Program]] | None = None
    for beats in itertools.chain(spread, listed):
        chosen = [program_and_tasks(device, beat) for device, beat in enumerate(beats)]
        try:
            span = max(ends[-1] for ends in run([tasks for _, tasks in chosen]))
        except Deadlock:
            continue
        if best is None or span < best[0] * (1 - 1e-9):
            best = span, [program for program, _ in chosen]
    if best is None:
        raise Deadlock(f"no interleaving of the stages {stages_of} runs without a deadlock")
    return best[1]


def drained_programs(
    placement: Sequence[int],
    forward_costs: Sequence[float],
    backward_costs: Sequence[float],
    micro_batches: int,
    exchange: bool,
) -> list[Program]:
    """The same for synchronous updates; see `device_programs`."""
    return dataflow_programs(placement, forward_costs, backward_costs, micro_batches, exchange, drained=True)


def engine_costs(stage_costs: Sequence[float], recompute: bool) -> tuple[list[float], list[float]]:
    """Relative forward and backward times by which the engine chooses the interleaving, from its plan's costs.

    Args:
        stage_costs: compute cost of each stage, in any unit.
        recompute: whether backwards replay the forward; the last stage never does.
    """
    mean = sum(stage_costs) / len(stage_costs) or 1.0
    forward = [max(cost / mean, 1e-3) for cost in stage_costs]
    replayed = [*(forward[:-1] if recompute else [0.0] * (len(forward) - 1)), 0.0]
    return forward, [2 * cost + again for cost, again in zip(forward, replayed, strict=True)]


def _late_first(offsets: Sequence[int], stages: Sequence[int]) -> Beat:
    """The beat of a device whose late stages come first; only what its stages stay behind each other matters."""
    base = 0 if 0 in stages else min((offsets[k] for k in stages), default=0)
    return [(k, offsets[k] - base) for k in reversed(stages)]


def candidate_offsets(num_stages: int, most: int) -> list[list[int]]:
    """Half slots that each stage stays behind stage 0: spread evenly so that the last stage is 1 .. K-1 slots late.

    Stage 0 itself may do its backward half a slot late, which puts it before the next forward.
    """
    if most == 1:
        return [[0] * num_stages]
    if num_stages <= 1:
        return [[0]]
    # A micro-batch needs (K-2)/3 periods up and 2(K-2)/3 down, so good leads lie between (K-2)/3 and (K+4)/3.
    leads = {1, num_stages - 1, *range(-(-(num_stages - 2) // 3), (num_stages + 4) // 3 + 1)}
    return [
        [front, *(2 * -(-late * k // (num_stages - 1)) for k in range(1, num_stages))]
        for late in sorted(lead for lead in leads if 1 <= lead < num_stages)
        for front in (1, 0)
    ]


def run_slots(num_stages: int, micro_batches: int, updates: int, synchronous: bool) -> list[Slot | Pause]:
    """The slots that the engine feeds its devices in a run of whole updates that ends with a barrier."""
    clock = Clock(num_stages, lambda update: synchronous)
    slots: list[Slot | Pause] = []
    for _ in range(updates):
        for _ in range(micro_batches):
            slots += clock.next_tick()[1]
        slots += clock.close_update()[1]
    return [*slots, Pause()]


def sample_slots(num_stages: int, micro_batches: int, synchronous: bool) -> list[Slot | Pause]:
    """Slots of a run that is long enough for a steady state: about 4 K ticks, in whole updates."""
    return run_slots(num_stages, micro_batches, max(2, -(-4 * num_stages // micro_batches)), synchronous)


def _durations(forward_costs: Sequence[float], backward_costs: Sequence[float]) -> Callable[[Instruction], float]:
    def duration(instruction: Instruction) -> float:
        if isinstance(instruction, Forward):
            return forward_costs[instruction.stage]
        if isinstance(instruction, Backward):
            return backward_costs[instruction.stage]
        return 0.0

    return duration
