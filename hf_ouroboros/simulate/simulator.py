"""Simulates a run: the engine's own programs (or a peer's), with the times of stages and links."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..schedules import SCHEDULES, device_programs, names_where
from ..schedules.instructions import Backward, Forward, InputGradient, Instruction, Step, WeightGradient
from ..schedules.interleave import engine_costs, run_slots
from ..schedules.replay import Executed, Message, replay
from .links import Links
from .peers import PEERS, peer_programs
from .timeline import Event, Timeline

MEASURED_TICKS = 48  # at least, in the steady state


def ours() -> list[str]:
    """The engine's own schedules of several devices."""
    return names_where(lambda schedule: schedule.uses_devices)


def simulated() -> list[str]:
    """All schedules that can be simulated."""
    return [*ours(), *PEERS]


@dataclass(frozen=True)
class StageCost:
    """What one stage takes per micro-batch, on its device.

    Args:
        forward: seconds.
        backward: seconds, with the replayed forward where there is one.
        step: seconds of its optimizer step, once per update.
        boundary_bytes: size of its output for the next stage; the gradient that comes back is as large.
        activation_bytes: what is kept between its forward and its backward.
        divided_bytes: how much more is kept from the gradient of its input to those of its weights, where they are apart; less than 0
            where that takes less than `activation_bytes`.
        gradient_bytes: what replicas average in every update.
        weight_share: part of the backward that the stage before does not wait for, where it is done on its own.
        plan_cost: relative cost by which the engine chooses how stages of one device are interleaved; None for
            the time that it takes.
    """

    forward: float
    backward: float
    step: float = 0.0
    boundary_bytes: float = 0.0
    activation_bytes: float = 0.0
    gradient_bytes: float = 0.0
    weight_share: float = 0.5
    plan_cost: float | None = None
    divided_bytes: float = 0.0

    def per_tick(self, micro_batches: int) -> float:
        """Seconds of work per micro-batch, the step spread over the update."""
        return self.forward + self.backward + self.step / micro_batches


@dataclass(frozen=True)
class Simulation:
    """What became of it.

    Args:
        schedule: its name.
        timeline: all that the devices did, in the form of a measured run.
        seconds_per_tick: per micro-batch, in the steady state.
        fill_seconds: until the first micro-batch has been forward through all stages.
        busy_shares: of each device, in the steady state.
        ticks_in_flight: most micro-batches that each device had between forward and backward, over all its stages.
        bytes_in_flight: most activation bytes that each device kept.
        work_per_tick: seconds that all devices together compute per micro-batch.
    """

    schedule: str
    timeline: Timeline
    seconds_per_tick: float
    fill_seconds: float
    busy_shares: tuple[float, ...]
    ticks_in_flight: tuple[int, ...]
    bytes_in_flight: tuple[float, ...]
    work_per_tick: float

    @property
    def speedup(self) -> float:
        """Over devices that take turns without any time on links: work per micro-batch / time per micro-batch."""
        return self.work_per_tick / self.seconds_per_tick


def simulate(
    schedule: str,
    placement: Sequence[int],
    costs: Sequence[StageCost],
    micro_batches: int,
    *,
    links: Links | None = None,
    replicas: int = 1,
    recompute: bool = False,
    exchange: bool = False,
    device_names: Sequence[str] | None = None,
) -> Simulation:
    """Simulates a run that is long enough for a steady state.

    Args:
        schedule: one of `simulated()`.
        placement: device of each stage; for `PEERS` as `peer_placement` says.
        costs: of each stage.
        micro_batches: M, ticks per update.
        links: connections between devices; None for none that take time.
        replicas: R; each has its own devices and averages its gradients with the others before every step.
        recompute: whether the engine is told so (`costs` has to contain it).
        exchange: whether gradient norms are exchanged in every update (`clip_scope="global"`).
        device_names: for the timeline.

    Raises:
        ValueError: unknown schedule, not one cost per stage, or no micro-batches.
    """
    stages, devices = len(placement), max(placement) + 1
    # In whole updates: two pipelines full to reach the steady state, something to measure, one to drain.
    warm = -(-2 * stages // max(micro_batches, 1))
    updates = warm + -(-(stages + max(stages, MEASURED_TICKS)) // max(micro_batches, 1)) + 1
    programs = run_programs(schedule, placement, costs, micro_batches, updates, recompute=recompute, exchange=exchange)
    executed = execute(programs, placement, costs, links or Links(), replicas)
    timeline = as_timeline(executed, devices, device_names)
    # Seen from the busiest device, which is the last to find its steady pace: others may be catching up with it.
    loads = device_loads(placement, costs, micro_batches)
    pacing = list(placement).index(max(loads, key=loads.__getitem__))
    start, end = timeline.steady_interval(warm * micro_batches, multiple_of=micro_batches, stage=pacing)
    ticks = sum(start < done <= end for done in timeline.forward_ends(pacing).values())
    held = [in_flight([e for e in executed if e.device == d], costs) for d in range(devices)]
    return Simulation(
        schedule,
        timeline,
        (end - start) / ticks,
        timeline.forward_ends()[0],
        tuple(timeline.busy_shares(start, end)),
        tuple(ticks for ticks, _ in held),
        tuple(size for _, size in held),
        math.fsum(cost.per_tick(micro_batches) for cost in costs),
    )


def run_programs(
    schedule: str,
    placement: Sequence[int],
    costs: Sequence[StageCost],
    micro_batches: int,
    updates: int,
    *,
    recompute: bool = False,
    exchange: bool = False,
) -> list[list[Instruction]]:
    """What every device does in a run of so many updates, in its order; arguments and errors as for `simulate`."""
    if schedule not in simulated():
        raise ValueError(f"schedule {schedule!r} can't be simulated; use one of {', '.join(simulated())}")
    if len(costs) != len(placement):
        raise ValueError(f"{len(costs)} stage costs for {len(placement)} stages")
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches} must be at least 1")
    if schedule in PEERS:
        return peer_programs(schedule, max(placement) + 1, micro_batches, updates)
    told = [cost.forward if cost.plan_cost is None else cost.plan_cost for cost in costs]
    made = device_programs(schedule, placement, *engine_costs(told, recompute), micro_batches, exchange)
    slots = run_slots(len(placement), micro_batches, updates, SCHEDULES[schedule].is_synchronous)
    return [list(program(slots)) for program in made]


def execute(
    programs: Sequence[Sequence[Instruction]],
    placement: Sequence[int],
    costs: Sequence[StageCost],
    links: Links,
    replicas: int = 1,
) -> list[Executed]:
    """Replays programs with the times of stages and links."""

    def duration(instruction: Instruction) -> float:
        match instruction:
            case Forward(stage):
                return costs[stage].forward
            case InputGradient(stage):
                return costs[stage].backward * (1 - costs[stage].weight_share)
            case Backward(stage):
                return costs[stage].backward
            case WeightGradient(stage):
                return costs[stage].backward * costs[stage].weight_share
            case Step(stage):
                return costs[stage].step
        return 0.0

    def transfer(instruction: Forward | Backward, source: int, target: int) -> Message:
        before = isinstance(instruction, Backward)
        return links.message(source, target, costs[instruction.stage - before].boundary_bytes)

    def after(instruction: Instruction) -> float:
        # The device's other stage goes on while replicas average.
        return (
            links.mean_over(replicas, costs[instruction.stage].gradient_bytes) if isinstance(instruction, Step) else 0
        )

    return replay(programs, duration, len(placement), transfer, after if replicas > 1 else None)


def as_timeline(executed: Sequence[Executed], devices: int, device_names: Sequence[str] | None = None) -> Timeline:
    """The same as a timeline: stages' work only, meetings and reports take no time of their own."""
    timeline = Timeline(devices, device_names)
    for e in executed:
        match e.instruction:
            case Forward(stage, tick):
                event = Event(e.device, stage, "forward", tick, e.start, e.end)
            case Backward(stage, tick):
                event = Event(e.device, stage, "backward", tick, e.start, e.end)
            case WeightGradient(stage, tick):
                event = Event(e.device, stage, "weights", tick, e.start, e.end)
            case Step(stage, update):
                event = Event(e.device, stage, "step", update, e.start, e.end)
            case _:
                continue
        timeline.record(event)
    return timeline


def in_flight(own: Sequence[Executed], costs: Sequence[StageCost]) -> tuple[int, float]:
    """Most micro-batches and most activation bytes that one device keeps at a time, over all its stages.

    A micro-batch counts once per stage. Where weight gradients are taken on their own, they end it.
    """
    ticks = most_ticks = 0
    size = most_size = 0.0
    for e in own:
        if isinstance(e.instruction, Forward):
            ticks, size = ticks + 1, size + costs[e.instruction.stage].activation_bytes
            most_ticks, most_size = max(most_ticks, ticks), max(most_size, size)
        elif isinstance(e.instruction, InputGradient):
            size += costs[e.instruction.stage].divided_bytes
            most_size = max(most_size, size)
        elif isinstance(e.instruction, (Backward, WeightGradient)):
            cost = costs[e.instruction.stage]
            divided = cost.divided_bytes if isinstance(e.instruction, WeightGradient) else 0.0
            ticks, size = ticks - 1, size - cost.activation_bytes - divided
    return most_ticks, most_size


def device_loads(placement: Sequence[int], costs: Sequence[StageCost], micro_batches: int) -> dict[int, float]:
    """Seconds that each device computes per micro-batch."""
    work = [cost.per_tick(micro_batches) for cost in costs]
    return {
        device: math.fsum(w for w, d in zip(work, placement, strict=True) if d == device)
        for device in sorted(set(placement))
    }


def ideal_speedup(placement: Sequence[int], costs: Sequence[StageCost], micro_batches: int) -> float:
    """Speed-up of this split if no device ever waited: all work / that of the busiest device."""
    loads = device_loads(placement, costs, micro_batches).values()
    return math.fsum(loads) / max(loads)
