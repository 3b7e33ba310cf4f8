"""From a planned split to simulated runs, under the engine's schedules and those of peers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..planning.memory_model import MemoryOptions
from ..planning.planner import PlannedStage, SplitPlan, plan_split
from ..schedules import SCHEDULES
from ..simulate.links import Links
from ..simulate.peers import PEERS, peer_placement
from ..simulate.simulator import Simulation, StageCost, ideal_speedup, simulate


def stage_costs(plan: SplitPlan, schedule: str | None = None) -> list[StageCost]:
    """What the simulator has to know of the stages of a plan.

    Args:
        plan: the plan.
        schedule: that executes it; None for the one that it was made for.
    """
    saved = plan.options.replays and schedule is not None and not _options(plan, schedule).replays
    return [
        StageCost(
            stage.forward,
            stage.backward - (stage.forward if saved and stage is not plan.stages[-1] else 0.0),
            stage.step,
            stage.units[-1].output_bytes,
            _whole_bytes(stage) if saved else _kept_bytes(plan, stage),
            sum(unit.parameter_bytes for unit in stage.units),
            weight_share=_weight_share(plan, stage, saved),
            plan_cost=sum(unit.plan_cost for unit in stage.units),
            divided_bytes=_whole_bytes(stage)
            - (_whole_bytes(stage) if saved else _kept_bytes(plan, stage))
            + sum(unit.arrival_bytes for unit in stage.units),
        )
        for stage in plan.stages
    ]


def _options(plan: SplitPlan, schedule: str) -> MemoryOptions:
    """Options of a plan under another schedule; no gradient of a peer is late."""
    known = schedule in SCHEDULES
    return replace(plan.options, schedule=schedule) if known else replace(plan.options, weights="then")


def _kept_bytes(plan: SplitPlan, stage: PlannedStage) -> float:
    """What a stage keeps of a micro-batch from its forward to its backward; with a replay, its input."""
    if plan.options.replays and stage is not plan.stages[-1]:
        return stage.units[0].output_bytes if stage.stage else 0.0
    return _whole_bytes(stage)


def _whole_bytes(stage: PlannedStage) -> float:
    return sum(unit.activation_bytes for unit in stage.units)


def _weight_share(plan: SplitPlan, stage: PlannedStage, saved: bool) -> float:
    """The part of a backward that is of the weights; the gradient of the input takes as long as a forward does."""
    replayed = plan.options.replays and stage is not plan.stages[-1]
    backward = stage.backward - (stage.forward if replayed and saved else 0.0)
    spent = stage.forward * (1 + (replayed and not saved))
    return min(1.0, max(0.0, 1 - spent / backward)) if backward else 0.0


def predict(plan: SplitPlan, schedule: str, links: Links, replicas: int = 1) -> Simulation:
    """Simulates a plan; a peer gets its own best split for as many devices, without memory limits.

    Peers put the two sides of tied embeddings on two devices; the time to add up their gradients is not counted.
    """
    names = [device.name for device in plan.devices]
    names = [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    if schedule in PEERS:
        plan = plan_split(
            replace(plan.facts, tied_bytes=0),
            [replace(device, memory=math.inf) for device in plan.devices],
            _options(plan, schedule),
            placement=peer_placement(schedule, len(plan.devices)),
        )
    used = max(plan.placement) + 1
    return simulate(
        schedule,
        plan.placement,
        stage_costs(plan, schedule),
        plan.options.micro_batches,
        links=links,
        replicas=replicas,
        recompute=_options(plan, schedule).replays,
        device_names=names[:used],
    )


def ideal(plan: SplitPlan) -> float:
    """Speed-up of a plan if no device ever waited."""
    return ideal_speedup(plan.placement, stage_costs(plan), plan.options.micro_batches)


SLOWER = 0.01
"""How much slower than the fastest plan one with fewer stages may be."""


def fewest_stages(
    plans: Mapping[int, SplitPlan], schedule: str, links: Links, replicas: int = 1
) -> tuple[SplitPlan, dict[int, float]]:
    """Of plans by number of stages, the one with the fewest that is simulated about as fast as the fastest; and the speeds of all.

    Stages more than needed delay gradients, keep activations and weights, and send messages; messages take the time that links say.
    """
    speeds = {k: 1 / predict(plans[k], schedule, links, replicas).seconds_per_tick for k in sorted(plans)}
    chosen = min(k for k, speed in speeds.items() if speed >= max(speeds.values()) * (1 - SLOWER))
    return plans[chosen], speeds
