"""Synchronous updates whose gradients of weights fill the bubbles: every device's order, by list scheduling from costs.

A stage's backward is done in two parts. The gradient of its input is what the stage before waits for; the gradients of its weights
are wanted at the step only. K = 3 on three devices, M = 5, all parts of equal length (F forward, B input gradient, W weight gradients; the
first stage's backward is not divided: nobody waits for it):

    stage 0   F0 F1 F2 F3 F4 B0 -- B1 -- B2 -- B3 -- B4 -- F5 F6 F7 ...
    stage 1      F0 F1 F2 B0 F3 B1 F4 B2 W0 B3 W1 B4 W2 W3 W4 F5 F6 ...
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 W0 W1 W2 W3 W4 F5 ...

The order is found once, for an update of M ticks: whenever a device is free, it takes up the most urgent of what is ready. That is one
order in time for all devices together, so no waiting in a circle can come of it, and neither of what is left of it when an
update ends early. A device goes through its part of it as the ticks come in.

Several are found, with other rules and lengths of the parts, and tried in some updates in which nothing takes quite as long as it
should: of orders that are alike on paper, some make everybody wait for whoever is late.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from .clock import Pause, Slot
from .in_time import work_in_time
from .instructions import (
    Backward,
    Exchange,
    Forward,
    InputGradient,
    Instruction,
    Program,
    Report,
    Settle,
    Step,
    WeightGradient,
)
from .interleave import run_slots
from .programs import stages_by_device
from .replay import prepare, run

LONGEST = 4096
"""Stages times ticks of one order; longer updates go through it several times."""

SMALL, FINE = 512, 4
"""Up to so many stages times ticks, so many more numbers of micro-batches are tried."""

WORTH = 0.01
"""Share of the time for which more micro-batches are kept."""

WEIGHTS = (1.0, 0.8)
"""Gradients of weights, in forwards, with which orders are found: as many products, but none of what a forward does besides. They
are tried with the last one, which is what layers of a GPT-2 and of a Llama of width 256 take on a CPU."""

UNEVEN = 0.1
"""By which share parts take longer than they should, on average, while orders are tried."""

TRIED = 32
"""Ticks over which they are tried, in whole updates."""


class Part(IntEnum):
    """What is done for a micro-batch in a stage, in this order."""

    FORWARD = 0
    INPUTS = 1
    WEIGHTS = 2


class Item(NamedTuple):
    """A part of the work of an update; `tick` counts from the update's first."""

    part: Part
    stage: int
    tick: int


class Costs(NamedTuple):
    """Relative times of a stage's parts."""

    forward: float
    inputs: float
    weights: float


Rule = Callable[[Item], tuple[int, ...]]
"""How urgent an item is among those of a device that are ready; the smallest comes first."""


def _rule(late_stages_first: bool) -> Rule:
    """Gradients that others wait for, forwards, and what nobody waits for."""

    def urgency(item: Item) -> tuple[int, ...]:
        if item.part is Part.FORWARD:
            return 1, -item.stage if late_stages_first else item.stage, item.tick
        awaited = item.part is Part.INPUTS and item.stage > 0
        return (0, -item.stage, item.tick) if awaited else (2, item.tick, -item.stage)

    return urgency


RULES = _rule(False), _rule(True)


def most_kept(stage: int, num_stages: int, micro_batches: int) -> int:
    """Most micro-batches that a stage keeps activations of, whatever the costs."""
    return min(micro_batches, 2 * num_stages - 1)


def _limits(num_stages: int, micro_batches: int) -> list[list[int]]:
    """How many micro-batches each stage may keep: from what it keeps undivided to `most_kept`, the fewest first."""
    found = [[num_stages - k for k in range(num_stages)]]
    steps = FINE if num_stages * micro_batches <= SMALL else 1
    found += [[num_stages + step * (num_stages - 1) // steps] * num_stages for step in range(steps + 1)]
    bounded = [tuple(min(micro_batches, limit) for limit in limits) for limits in found]
    return [list(limits) for limits in dict.fromkeys(bounded)]


class _Devices:
    """All devices at work on an update, in simulated time.

    Args:
        placement: device of each stage.
        costs: of each stage.
        ticks: of the update.
        limits: most micro-batches that each stage may keep.
        rule: what is most urgent.
    """

    def __init__(self, placement: Sequence[int], costs: Sequence[Costs], ticks: int, limits: Sequence[int], rule: Rule):
        self.orders: list[list[Item]] = [[] for _ in range(max(placement) + 1)]
        self._placement, self._costs, self._ticks, self._limits, self._rule = placement, costs, ticks, limits, rule
        self._stages_of = stages_by_device(placement)
        self._free = [0.0] * len(self.orders)
        self._ends: dict[Item, float] = {}
        self._next = {(part, k): 0 for part in Part for k in range(len(placement))}

    def run(self) -> list[list[Item]]:
        """Every device's order."""
        work_in_time(len(self.orders), self._plan, self._do)
        return self.orders

    def _plan(self, device: int) -> tuple[float, Item] | None:
        """When the device can go on, and with what; None if nothing is known to come."""
        ready = [
            (max(start, self._free[device]), item)
            for stage in self._stages_of[device]
            for part in Part
            if (item := Item(part, stage, self._next[part, stage])).tick < self._ticks
            and (start := self._ready(item)) is not None
        ]
        if not ready:
            return None
        first = min(start for start, _ in ready)
        return first, min((item for start, item in ready if start == first), key=self._rule)

    def _ready(self, item: Item) -> float | None:
        """When what an item needs is there; None if that is not known yet."""
        part, stage, tick = item
        last = len(self._placement) - 1
        if part is Part.FORWARD:
            kept = tick - self._next[Part.WEIGHTS if stage else Part.INPUTS, stage]
            if kept >= self._limits[stage]:
                return None
            return 0.0 if stage == 0 else self._ends.get(Item(part, stage - 1, tick))
        if part is Part.WEIGHTS:
            return self._ends.get(Item(Part.INPUTS, stage, tick)) if stage else None
        needs = [Item(part, stage + 1, tick) if stage < last else Item(Part.FORWARD, stage, tick)]
        if 0 == stage < last and self._placement[0] == self._placement[last]:
            needs.append(Item(Part.WEIGHTS, last, tick))  # the head's side of a tied matrix
        ends = [self._ends[need] for need in needs if need in self._ends]
        return max(ends) if len(ends) == len(needs) else None

    def _do(self, device: int, start: float, item: Item) -> set[int]:
        """Does an item; returns the devices for which that changes something."""
        self.orders[device].append(item)
        self._next[item.part, item.stage] += 1
        self._free[device] = self._ends[item] = start + self._costs[item.stage][item.part]
        neighbour = item.stage + {Part.FORWARD: 1, Part.INPUTS: -1}.get(item.part, 0)
        return {device, *self._placement[max(neighbour, 0) : neighbour + 1]}


class _Arrivals:
    """The ticks of an update that have come, and what ended it.

    Args:
        slots: that the device is fed.
    """

    def __init__(self, slots: Iterable[Slot | Pause]):
        self._slots = iter(slots)
        self.ticks: list[int] = []
        self.ending: Slot | Pause | None = None
        self.is_over = False

    def has(self, index: int) -> bool:
        """Whether the update has so many ticks and one more; waits until that is known."""
        while len(self.ticks) <= index and self.ending is None and not self.is_over:
            self._take()
        return index < len(self.ticks) and not self.is_over

    def _take(self) -> None:
        slot = next(self._slots, None)
        if slot is None:
            self.is_over = True
            return
        if not isinstance(slot, Pause) and slot.tick is not None:
            self.ticks.append(slot.tick)
        if isinstance(slot, Pause) or slot.update is not None:
            self.ending = slot


def filling_program(
    stages: Sequence[int], order: Sequence[Item], micro_batches: int, exchange: bool = False
) -> Program:
    """A device that goes through its order once per update; again where an update is longer, or was looked at.

    Args:
        stages: the device's.
        order: what it does for an update.
        micro_batches: for how many ticks that is.
        exchange: whether norms are exchanged before every step (global clipping).
    """
    down = sorted(stages, reverse=True)

    def program(slots: Iterable[Slot | Pause]) -> Iterator[Instruction]:
        come = _Arrivals(slots)
        while True:
            for item in order:
                if come.has(item.tick):
                    yield _instruction(item, come.ticks[item.tick])
            come.has(micro_batches)
            if come.is_over:
                return
            come.ticks = come.ticks[micro_batches:]
            if come.ticks:
                continue
            ending, come.ending = come.ending, None
            if isinstance(ending, Pause):
                if ending.settle:
                    yield from (Settle(stage) for stage in down)
                yield Report()
            elif ending is not None and ending.update is not None:
                if exchange:
                    yield Exchange(ending.update)
                for stage in down:
                    yield Step(stage, ending.update)

    return program


def _instruction(item: Item, tick: int) -> Instruction:
    if item.part is Part.FORWARD:
        return Forward(item.stage, tick)
    if item.part is Part.WEIGHTS:
        return WeightGradient(item.stage, tick)
    return InputGradient(item.stage, tick) if item.stage else Backward(0, tick)


Orders = list[list[Item]]
"""Of all devices, for an update."""


def filling_programs(
    placement: Sequence[int],
    forward_costs: Sequence[float],
    backward_costs: Sequence[float],
    micro_batches: int,
    exchange: bool,
) -> list[Program]:
    """The programs of all devices; see `device_programs`."""
    ticks = min(micro_batches, max(1, LONGEST // len(placement)))
    orders = _best_orders(tuple(placement), tuple(forward_costs), tuple(backward_costs), ticks, exchange)
    return _programs(placement, orders, ticks, exchange)


def _programs(placement: Sequence[int], orders: Orders, ticks: int, exchange: bool) -> list[Program]:
    stages_of = stages_by_device(placement)
    return [filling_program(stages, order, ticks, exchange) for stages, order in zip(stages_of, orders, strict=True)]


@functools.lru_cache(maxsize=64)
def _best_orders(
    placement: tuple[int, ...],
    forward_costs: tuple[float, ...],
    backward_costs: tuple[float, ...],
    ticks: int,
    exchange: bool,
) -> Orders:
    """The orders that are the fastest when tried, or nearly so and keep fewer micro-batches."""
    pairs = list(zip(forward_costs, backward_costs, strict=True))
    lengths = [[_costs(stage, *pair, weights) for stage, pair in enumerate(pairs)] for weights in WEIGHTS]
    trial = _Trial(placement, lengths[-1], ticks, exchange)
    found: list[tuple[float, Orders]] = []
    for limits, rule, costs in itertools.product(_limits(len(placement), ticks), RULES, lengths):
        orders = _Devices(placement, costs, ticks, limits, rule).run()
        found.append((trial.span(orders), orders))
    enough = min(span for span, _ in found) * (1 + WORTH)
    return next(orders for span, orders in found if span <= enough)


class _Trial:
    """Some updates in which nothing takes quite as long as it should, the same for all orders.

    Args:
        placement, ticks, exchange: as of `_best_orders`.
        costs: of each stage.
    """

    def __init__(self, placement: Sequence[int], costs: Sequence[Costs], ticks: int, exchange: bool):
        self._placement, self._costs, self._ticks, self._exchange = placement, costs, ticks, exchange
        updates = max(2, -(-TRIED // ticks))
        self._slots = run_slots(len(placement), ticks, updates, synchronous=True)
        # Products only, which all machines round alike: the processes of a run have to choose alike.
        drawn = random.Random(0)
        items = itertools.product(range(ticks * updates), range(len(placement)), Part)
        self._late = {Item(part, k, t): 1 + 4 * UNEVEN * drawn.random() * drawn.random() for t, k, part in items}

    def span(self, orders: Orders) -> float:
        """How long they take with these orders."""
        programs = _programs(self._placement, orders, self._ticks, self._exchange)
        tasks = [prepare(each(self._slots), d, self._placement, self._duration) for d, each in enumerate(programs)]
        return max(ends[-1] for ends in run(tasks))

    def _duration(self, instruction: Instruction) -> float:
        match instruction:
            case Forward(stage, tick):
                item = Item(Part.FORWARD, stage, tick)
            case Backward(stage, tick):
                item = Item(Part.INPUTS, stage, tick)
            case WeightGradient(stage, tick):
                item = Item(Part.WEIGHTS, stage, tick)
            case _:
                return 0.0
        return self._costs[item.stage][item.part] * self._late[item]


def _costs(stage: int, forward: float, backward: float, weights: float) -> Costs:
    later = weights * min(forward, backward / 2) if stage else 0.0
    return Costs(forward, backward - later, later)
