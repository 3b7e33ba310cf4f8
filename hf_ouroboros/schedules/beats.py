"""Beats: in which order a device with any stages does what comes again in every slot; found by list scheduling from costs.

Every stage has its own order, forward F and then backward-and-step B of slot after slot. A device goes through these *half slots* of its stages in a beat. Six
equal stages on three devices, one of several beats that never wait (slot after the point):

    device 0, stages 0 and 3     F0.9 B3.8 F3.9 B0.9 | F0.10 B3.9 F3.10 B0.10 | ...
    device 1, stages 1 and 4     F1.9 B4.8 F4.9 B1.9 | ...
    device 2, stages 2 and 5     F2.9 B5.8 F5.9 B2.9 | ...

In simulated time, whenever a device is free it takes up the most urgent half slot that is ready. After a while the devices go at a steady
pace, and what a device does from one forward of its first stage to the next is its beat. No rule of what is urgent is always the best, so there are
several; whoever asks for beats simulates them, finds out which are the fastest and whether they run without a deadlock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .in_time import work_in_time
from .programs import Beat, stages_by_device

STEADY = 2
"""Slots, in K, after which the pace is taken for steady."""

FURTHEST = 1
"""Slots, in K, that a stage may stay behind the newest one."""

EFFORT = 2**15
"""About how many times K * K there are to all rules together; one rule is always tried."""


class Half(NamedTuple):
    """A half of what a stage does in a slot; even numbers are forwards, odd ones are backwards."""

    stage: int
    number: int


Rule = Callable[[Half], tuple[float, ...]]
"""How urgent a half is among those of a device that are ready; the smallest comes first."""


def found_beats(
    placement: Sequence[int], forward_costs: Sequence[float], backward_costs: Sequence[float]
) -> Iterator[list[Beat]]:
    """The beats of all devices, by one rule after the other.

    Args:
        placement: device of each stage.
        forward_costs: relative time of each stage's forward.
        backward_costs: relative time of each stage's backward and share of the step.
    """
    stages_of = stages_by_device(placement)
    for rule in _rules(stages_of, forward_costs, backward_costs):
        orders = _Devices(placement, forward_costs, backward_costs, rule).run()
        beats = [_beat(o, own, STEADY * len(placement)) for o, own in zip(orders, stages_of, strict=True)]
        most = 2 * FURTHEST * len(placement)
        if all(0 <= keep <= most for beat in beats for _, keep in beat):
            yield beats


def _rules(
    stages_of: Sequence[Sequence[int]], forward_costs: Sequence[float], backward_costs: Sequence[float]
) -> list[Rule]:
    """By when a half is due if all devices are busy all the time, and what usually keeps others busy."""
    stages = len(forward_costs)
    period = max(sum(forward_costs[k] + backward_costs[k] for k in own) for own in stages_of)
    up = [sum(forward_costs[:k]) for k in range(stages)]

    def early(half: Half) -> tuple[float, ...]:
        stage, number = half
        return number // 2 * period + up[stage] + (forward_costs[stage] if number % 2 else 0.0), -stage

    def late(half: Half) -> tuple[float, ...]:
        stage, number = half
        return number // 2 * period + up[stage] + (period - backward_costs[stage] if number % 2 else 0.0), -stage

    def even(half: Half) -> tuple[float, ...]:
        stage, number = half
        return (number / 2 + stage / stages) * period, -stage

    def oldest(half: Half) -> tuple[float, ...]:
        return half.number // 2, -half.stage

    def backward(half: Half) -> tuple[float, ...]:
        return -(half.number % 2), -half.stage

    rules: list[Rule] = [early, late, even, oldest, backward]
    return rules[: max(1, EFFORT // stages**2)]


class _Devices:
    """All devices at work on as many slots as it takes; arguments as of `found_beats`."""

    def __init__(
        self,
        placement: Sequence[int],
        forward_costs: Sequence[float],
        backward_costs: Sequence[float],
        rule: Rule,
    ):
        self._placement, self._costs, self._rule = placement, (forward_costs, backward_costs), rule
        self._stages_of = stages_by_device(placement)
        self._last = len(placement) - 1
        # A beat is looked for half way; behind it, as much again is there for stages that are late.
        self._halves = 2 * 2 * STEADY * len(placement)
        self._orders: list[list[Half]] = [[] for _ in self._stages_of]
        self._free = [0.0] * len(self._stages_of)
        self._next = [0] * len(placement)
        self._ends: dict[Half, float] = {}

    def run(self) -> list[list[Half]]:
        """What every device does, in its order."""
        work_in_time(len(self._stages_of), self._plan, self._do)
        return self._orders

    def _plan(self, device: int) -> tuple[float, Half] | None:
        ready = [
            (max(start, self._free[device]), half)
            for stage in self._stages_of[device]
            if (half := Half(stage, self._next[stage])).number < self._halves
            and (start := self._ready(half)) is not None
        ]
        if not ready:
            return None
        first = min(start for start, _ in ready)
        return first, min((half for start, half in ready if start == first), key=self._rule)

    def _ready(self, half: Half) -> float | None:
        """When a half can begin, its stage's earlier ones being done; None if that is not known yet."""
        stage, number = half
        if number % 2 == 0:  # the forward of the stage before, in the same slot
            return 0.0 if stage == 0 else self._ends.get(Half(stage - 1, number))
        if stage == self._last or number == 1:
            return 0.0
        return self._ends.get(Half(stage + 1, number - 2))  # the backward of the stage after, in the slot before

    def _do(self, device: int, start: float, half: Half) -> set[int]:
        stage, number = half
        self._orders[device].append(half)
        self._next[stage] = number + 1
        self._free[device] = self._ends[half] = start + self._costs[number % 2][stage]
        neighbour = stage - 1 if number % 2 else stage + 1
        return {device, self._placement[min(max(neighbour, 0), self._last)]}


def _beat(order: Sequence[Half], stages: Sequence[int], slot: int) -> Beat:
    """What a device does from its first stage's forward of a slot on, until every stage has done two halves."""
    begin = order.index(Half(stages[0], 2 * slot))
    missing, beat = dict.fromkeys(stages, 2), []
    for stage, number in order[begin:]:
        if missing[stage]:
            missing[stage] -= 1
            beat.append((stage, 2 * (slot + 1) - (number + 1)))
    return beat
