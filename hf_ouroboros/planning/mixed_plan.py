"""Plans with stages on any devices, several on one where that balances better: the best that is found for each number of stages.

Which of them is worth its delay and its messages is for a simulation to say (`commands/prediction.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..errors import DeviceMapError
from ..partition.balance import Load
from ..partition.device_map import default_num_stages
from ..partition.mixed import WORTH, best_in_any_order, mixed_splits
from ..partition.sweeps import MixedSplit
from .memory_model import MemoryOptions, memory_load
from .planner import PlannedDevice, SplitPlan, assembled, plan_split, time_load
from .unit_facts import ModelFacts

FURTHER = 12
"""Most stages beyond the fewest that are tried."""


def mixed_plans(
    facts: ModelFacts, devices: Sequence[PlannedDevice], options: MemoryOptions, num_stages: int | None = None
) -> dict[int, SplitPlan]:
    """Plans by number of stages, the contiguous one among them if it fits.

    Args:
        facts: the model and its micro-batches.
        devices: in worker order.
        options: what decides about memory.
        num_stages: K; None for all that could be worth it.

    Raises:
        DeviceMapError: nothing fits, or no split has so many stages.
    """
    fewest = min(default_num_stages(len(devices), facts.tied), facts.layers + 1)
    contiguous, refused = None, None
    try:
        contiguous = plan_split(facts, devices, options, fewest)
    except DeviceMapError as error:
        refused = error
    if num_stages is not None:
        plan = _mixed_plan(facts, devices, options, num_stages, contiguous if num_stages == fewest else None)
        if plan is None and num_stages == fewest and refused is not None:
            raise refused
        if plan is None:
            raise DeviceMapError(
                f"num_stages={num_stages}: no split of {facts.layers} layers into so many stages on {len(devices)} devices, neighbours on "
                "different ones, was found that fits; leave it out to have the number chosen"
            )
        return {num_stages: plan}
    plans = {} if contiguous is None else {fewest: contiguous}
    for stages in _worth_trying(facts, devices, options, fewest, contiguous):
        if (plan := _mixed_plan(facts, devices, options, stages, contiguous)) is not None:
            plans[stages] = plan
    if refused is not None and not plans:
        raise refused
    return plans


def _worth_trying(
    facts: ModelFacts,
    devices: Sequence[PlannedDevice],
    options: MemoryOptions,
    fewest: int,
    contiguous: SplitPlan | None,
) -> list[int]:
    """Numbers of stages that could save enough, if the best balance of all were to be had."""
    most = min(facts.layers + 2, fewest + FURTHER) if len(devices) > 1 else 0
    if contiguous is not None and most:
        floor = best_in_any_order(_times(facts, devices, options, fewest), facts.tied).heaviest
        gain = math.log(max(1.0, _as_split(contiguous).heaviest / floor)) / math.log1p(WORTH)
        most = min(most, fewest + int(gain)) if gain >= 1 else fewest - 1
    return list(range(max(fewest, _least(facts)), most + 1))


def _mixed_plan(
    facts: ModelFacts,
    devices: Sequence[PlannedDevice],
    options: MemoryOptions,
    stages: int,
    known: SplitPlan | None,
) -> SplitPlan | None:
    if not _least(facts) <= stages <= facts.layers + 2:
        return None
    split = mixed_splits(
        _times(facts, devices, options, stages),
        [stages],
        facts.tied,
        memory_load(facts, stages, options),
        [device.memory for device in devices],
        None if known is None else _as_split(known),
    ).get(stages)
    return None if split is None else assembled(facts, devices, split.placement, split.counts, options)


def _least(facts: ModelFacts) -> int:
    """Neighbouring stages are on different devices, and the last one of a tied model is where the first one is."""
    return 3 if facts.tied else 2


def _times(facts: ModelFacts, devices: Sequence[PlannedDevice], options: MemoryOptions, stages: int) -> list[Load]:
    """Work of so many stages on every device; the same object for devices that are alike."""
    made: dict[PlannedDevice, Load] = {}
    return [
        made.setdefault(replace(device, name="", memory=0.0), time_load(facts, [device], [0] * stages, options))
        for device in devices
    ]


def _as_split(plan: SplitPlan) -> MixedSplit:
    loads = [0.0] * len(plan.devices)
    for stage in plan.stages:
        loads[stage.device] += stage.forward + stage.backward + stage.step / plan.options.micro_batches
    return MixedSplit(plan.placement, plan.counts, tuple(loads))
