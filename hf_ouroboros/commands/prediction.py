"""From a planned split to simulated runs, under the engine's schedules and those of peers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..planning.memory_model import MemoryOptions
from ..planning.planner import PlannedStage, SplitPlan, plan_split
from ..schedules import SCHEDULES
from ..simulate.links import Links
from ..simulate.peers import PEERS, peer_placement
from ..simulate.sharded import FSDP, ShardedUnit, simulate_sharded
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
            divided_bytes=sum(unit.later_bytes for unit in stage.units)
            - (_whole_bytes(stage) if saved else _kept_bytes(plan, stage)),
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
    """Simulates a plan; a peer gets its own split for as many devices, without memory limits.

    Where a peer has several stages on a device, the stages are balanced and not the devices, as by those who use it. Peers put the
    two sides of tied embeddings on two devices; the time to add up their gradients is not counted.

    Raises:
        ValueError: a peer that can't do these numbers of devices, layers or micro-batches.
    """
    names = [device.name for device in plan.devices]
    names = [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    if schedule == FSDP:
        return simulate_sharded(
            sharded_units(plan),
            plan.options.micro_batches,
            links=links,
            replicas=replicas,
            kept_bytes=_bytes_of_all_layers(plan),
            device_names=names,
        )
    placement: Sequence[int] = plan.placement
    if schedule in PEERS:
        placement = peer_placement(schedule, len(plan.devices))
        plan = plan_split(
            replace(plan.facts, tied_bytes=0),
            [replace(plan.devices[device], memory=math.inf) for device in placement],
            _options(plan, schedule),
            placement=range(len(placement)),
        )
    used = max(placement) + 1
    return simulate(
        schedule,
        placement,
        stage_costs(plan, schedule),
        plan.options.micro_batches,
        links=links,
        replicas=replicas,
        recompute=_options(plan, schedule).replays,
        device_names=names[:used],
    )


def sharded_units(plan: SplitPlan) -> list[ShardedUnit]:
    """What the simulator of FSDP has to know of the model of a plan; with recompute, layers are computed again one by one."""
    again = plan.options.recompute
    found = []
    for number, unit in enumerate(plan.facts.units):
        times = [device.times[number] for device in plan.devices]
        is_layer = unit.kind == "layer"
        found.append(
            ShardedUnit(
                [t.forward for t in times],
                [t.backward + (t.forward if again and is_layer else 0.0) for t in times],
                [t.step for t in times],
                unit.parameter_bytes,
                unit.trained,
                is_layer,
            )
        )
    return found


def _bytes_of_all_layers(plan: SplitPlan) -> float:
    """What a device keeps of a micro-batch that passes the whole model; with recompute, inputs and one layer."""
    units = plan.facts.units
    if not plan.options.recompute:
        return sum(unit.activation_bytes for unit in units)
    layers = [unit for unit in units if unit.kind == "layer"]
    ends = sum(unit.activation_bytes for unit in units if unit.kind != "layer")
    return ends + sum(unit.output_bytes for unit in layers) + max(unit.activation_bytes for unit in layers)


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
