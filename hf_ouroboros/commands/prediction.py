"""From a planned split to simulated runs, under the engine's schedules and those of peers."""

from __future__ import annotations

import math
from dataclasses import replace

from ..planning.planner import PlannedStage, SplitPlan, plan_split
from ..simulate.links import Links
from ..simulate.peers import PEERS, peer_placement
from ..simulate.simulator import Simulation, StageCost, ideal_speedup, simulate


def stage_costs(plan: SplitPlan) -> list[StageCost]:
    """What the simulator has to know of the stages of a plan."""
    return [
        StageCost(
            stage.forward,
            stage.backward,
            stage.step,
            stage.units[-1].output_bytes,
            _kept_bytes(plan, stage),
            sum(unit.parameter_bytes for unit in stage.units),
            weight_share=_weight_share(plan, stage),
            plan_cost=sum(unit.plan_cost for unit in stage.units),
            divided_bytes=_whole_bytes(stage)
            - _kept_bytes(plan, stage)
            + sum(unit.arrival_bytes for unit in stage.units),
        )
        for stage in plan.stages
    ]


def _kept_bytes(plan: SplitPlan, stage: PlannedStage) -> float:
    """What a stage keeps of a micro-batch from its forward to its backward; with recompute, its input."""
    if plan.options.recompute and stage is not plan.stages[-1]:
        return stage.units[0].output_bytes if stage.stage else 0.0
    return _whole_bytes(stage)


def _whole_bytes(stage: PlannedStage) -> float:
    return sum(unit.activation_bytes for unit in stage.units)


def _weight_share(plan: SplitPlan, stage: PlannedStage) -> float:
    """The part of a backward that is of the weights; the gradient of the input takes as long as a forward does."""
    replayed = plan.options.recompute and stage is not plan.stages[-1]
    spent = stage.forward * (1 + replayed)
    return min(1.0, max(0.0, 1 - spent / stage.backward)) if stage.backward else 0.0


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
            plan.options,
            placement=peer_placement(schedule, len(plan.devices)),
        )
    used = max(plan.placement) + 1
    return simulate(
        schedule,
        plan.placement,
        stage_costs(plan),
        plan.options.micro_batches,
        links=links,
        replicas=replicas,
        recompute=plan.options.recompute,
        device_names=names[:used],
    )


def ideal(plan: SplitPlan) -> float:
    """Speed-up of a plan if no device ever waited."""
    return ideal_speedup(plan.placement, stage_costs(plan), plan.options.micro_batches)
