"""Searches for balanced splits into stages on any devices, by number of stages, with no device above a bound.

The row of layers is handed out from left to right; a stage ends where the device changes. Of all ways to hand out the first layers in so many
stages, those go on that leave most room below the bound (a beam search). Loads are added and compared in one order only, so that every process
finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from .balance import Load
from .unordered import unordered

EFFORT = 30_000
"""About how many steps a sweep takes."""


@dataclass(frozen=True)
class MixedSplit:
    """A split into stages on any devices.

    Args:
        placement: device of every stage.
        counts: layers of every stage; the first and the last one may have none.
        loads: work of every device.
    """

    placement: tuple[int, ...]
    counts: tuple[int, ...]
    loads: tuple[float, ...]

    @property
    def heaviest(self) -> float:
        """Work of the busiest device."""
        return max(self.loads)

    @property
    def unevenness(self) -> float:
        """What tells apart splits whose busiest devices have as much to do."""
        return sum(load * load for load in self.loads)


def keep_best(found: dict[int, MixedSplit], split: MixedSplit) -> None:
    """Notes a split, by its number of stages, where none is known that is as good."""
    other = found.get(len(split.placement))
    if other is None or split.heaviest < other.heaviest * (1 - 1e-9):
        found[len(split.placement)] = split
    elif split.heaviest <= other.heaviest and split.unevenness < other.unevenness * (1 - 1e-9):
        found[len(split.placement)] = split


class _State(NamedTuple):
    """Some of the row, handed out.

    Args:
        device: of the last layer.
        used: devices that have a stage, as bits.
        loads: work of every device.
        sizes: memory of every device.
        trail: devices of the layers, the newest first, as pairs of (device, those before).
    """

    device: int
    used: int
    loads: tuple[float, ...]
    sizes: tuple[float, ...]
    trail: Any


States = dict[int, list[_State]]
"""By the number of the stage that is open."""


class Sweeps:
    """Beam searches over the row of layers, from left to right; arguments as of `mixed_splits`."""

    def __init__(
        self,
        times: Sequence[Load],
        stages: Sequence[int],
        tied: bool,
        memory: Load | None,
        limits: Sequence[float] | None,
    ):
        self._times, self._stages, self._tied, self._most = times, set(stages), tied, max(stages)
        self._devices, self._layers = len(times), len(times[0].layers[0])
        nothing = Load([[0.0] * self._layers] * self._most, [0.0] * self._most)
        self._memory = nothing if memory is None or limits is None else memory
        self._limits = [math.inf] * self._devices if memory is None or limits is None else list(limits)
        kinds: dict[Any, int] = {}
        self._kinds = [
            kinds.setdefault((id(load), limit, tied and device == 0), len(kinds))
            for device, (load, limit) in enumerate(zip(times, self._limits, strict=True))
        ]
        # As many devices as can have a stage have one: the first has the embedding, all others need a layer.
        self._needed = min(self._devices, self._layers + 1, self._most - tied)
        self._width = max(6, EFFORT // (self._layers * self._most * self._devices))
        self._rows = [list(map(min, zip(*load.layers, strict=True))) for load in times]
        head = [math.inf if tied else load.fixed[-1] for load in times]
        # The least that can still come to a device before and after each layer, and what is still to come in all.
        self._least = [
            [min([*row[i:], end]) for i in range(self._layers + 1)] for row, end in zip(self._rows, head, strict=True)
        ]
        cheapest = list(map(min, zip(*self._rows, strict=True)))
        self._rest = [sum(cheapest[i:]) + (0.0 if tied else min(head)) for i in range(self._layers + 1)]
        self.everything = max(sum(load.fixed) + sum(map(max, zip(*load.layers, strict=True))) for load in times)

    def bound_stages(self, most: int) -> None:
        """Looks for no more stages than so many."""
        if len(self._stages) > 1:
            self._most = most

    def in_any_order(self) -> MixedSplit:
        """The best balance that is found if neither the number of stages nor memory matters."""
        found = []
        for last in [0] if self._tied else range(self._devices):
            if last > 1 and self._kinds[last] in self._kinds[1:last]:
                continue
            loads = [0.0] * self._devices
            loads[0] += self._times[0].fixed[0]
            loads[last] += self._times[last].fixed[-1]
            devices = unordered(self._rows, loads)
            for layer, device in enumerate(devices):
                loads[device] += self._rows[device][layer]
            found.append(_split([0, *devices, last], loads))
        return min(found, key=lambda split: split.heaviest)

    def allows(self, split: MixedSplit) -> bool:
        """Whether a split fits into memory and uses the devices; where all stages need as much for a layer."""
        sizes, layer = [0.0] * self._devices, 0
        sizes[split.placement[0]] += self._memory.fixed[0]
        sizes[split.placement[-1]] += self._memory.fixed[-1]
        for device, count in zip(split.placement, split.counts, strict=True):
            sizes[device] += sum(self._memory.layers[0][layer : layer + count])
            layer += count
        fits = all(size <= limit for size, limit in zip(sizes, self._limits, strict=True))
        return fits and len(set(split.placement)) >= self._needed and len(split.placement) <= self._most

    def in_order(self, split: MixedSplit) -> MixedSplit:
        """The same, devices that are alike being taken in the order in which the row comes to them."""
        alike: dict[int, list[int]] = {}
        for device, kind in enumerate(self._kinds):
            alike.setdefault(kind, []).append(device)
        order = [*dict.fromkeys(split.placement), *(d for d in range(self._devices) if d not in split.placement)]
        names = {device: alike[self._kinds[device]].pop(0) for device in order}
        loads = [0.0] * self._devices
        for device, name in names.items():
            loads[name] = split.loads[device]
        return MixedSplit(tuple(names[device] for device in split.placement), split.counts, tuple(loads))

    def below(self, bound: float) -> list[MixedSplit]:
        """The best splits that are found, by number of stages, with no device above a bound."""
        bound *= 1 + 1e-9
        loads, sizes = [0.0] * self._devices, [0.0] * self._devices
        loads[0] = self._times[0].fixed[0] + (self._times[0].fixed[-1] if self._tied else 0.0)
        sizes[0] = self._memory.fixed[0] + (self._memory.fixed[-1] if self._tied else 0.0)
        if loads[0] > bound or sizes[0] > self._limits[0]:
            return []
        states: States = {0: [_State(0, 1, tuple(loads), tuple(sizes), None)]}
        for layer in range(self._layers):
            states = self._handed_out(states, layer, bound)
        return self._finished(states, bound)

    def _handed_out(self, states: States, layer: int, bound: float) -> States:
        """All ways to hand out one layer more; of each number of stages, the most promising."""
        found: dict[int, dict[Any, tuple[Any, _State]]] = {}
        for stage, some in states.items():
            for state in some:
                tried = set()
                for device in range(self._devices):
                    k = stage + (device != state.device)
                    if k >= self._most:
                        continue
                    if device != state.device:
                        mine = (self._kinds[device], state.used >> device & 1, state.loads[device], state.sizes[device])
                        if mine in tried:
                            continue
                        tried.add(mine)
                    given = self._given(state, device, k, layer, bound)
                    if given is None:
                        continue
                    room = self._room(given.loads, layer + 1, bound)
                    if room < self._rest[layer + 1] * (1 - 1e-9):
                        continue
                    signs = list(
                        zip(self._kinds, map(bool, self._bits(given.used)), given.loads, given.sizes, strict=True)
                    )
                    rank = -room, -sum(load * load for load in given.loads)
                    found.setdefault(k, {}).setdefault((signs[device], *sorted(signs)), (rank, given))
        return {
            k: [state for _, state in sorted(some.values(), key=lambda item: item[0])[: self._width]]
            for k, some in sorted(found.items())
        }

    def _given(self, state: _State, device: int, k: int, layer: int, bound: float) -> _State | None:
        """A state with one layer more, which stage k on this device gets; None where that leads nowhere."""
        load = state.loads[device] + self._times[device].layers[k][layer]
        size = state.sizes[device] + self._memory.layers[k][layer]
        if device != state.device and k < self._most - 1:
            load += self._times[device].fixed[k]
            size += self._memory.fixed[k]
        used = state.used | 1 << device
        missing = self._needed - used.bit_count()
        left = self._layers - layer - 1 + (not self._tied)
        if load > bound or size > self._limits[device] or missing > left or k + missing >= self._most:
            return None
        loads = (*state.loads[:device], load, *state.loads[device + 1 :])
        sizes = (*state.sizes[:device], size, *state.sizes[device + 1 :])
        return _State(device, used, loads, sizes, (device, state.trail))

    def _room(self, loads: Sequence[float], layer: int, bound: float) -> float:
        """What devices have left, but for those into which nothing fits that is still to come."""
        return sum(bound - load for load, least in zip(loads, self._least, strict=True) if bound - load >= least[layer])

    def _bits(self, used: int) -> list[int]:
        return [used >> device & 1 for device in range(self._devices)]

    def _finished(self, states: States, bound: float) -> list[MixedSplit]:
        """With the head, where it fits; one split for every number of stages."""
        found: dict[int, MixedSplit] = {}
        for state in (state for some in states.values() for state in some):
            for device in [0] if self._tied else range(self._devices):
                loads, sizes = list(state.loads), list(state.sizes)
                if not self._tied:
                    loads[device] += self._times[device].fixed[-1]
                    sizes[device] += self._memory.fixed[-1]
                used = state.used | 1 << device
                if loads[device] > bound or sizes[device] > self._limits[device] or used.bit_count() < self._needed:
                    continue
                trail, devices = state.trail, [device]
                while trail is not None:
                    devices.append(trail[0])
                    trail = trail[1]
                split = _split([0, *reversed(devices)], loads)
                if len(split.placement) in self._stages:
                    keep_best(found, split)
        return list(found.values())


def _split(devices: Sequence[int], loads: Sequence[float]) -> MixedSplit:
    """From the devices of the embedding, of every layer, and of the head."""
    cuts = [0, *(i for i in range(1, len(devices)) if devices[i] != devices[i - 1]), len(devices)]
    counts = [b - a for a, b in pairwise(cuts)]
    counts[0] -= 1
    counts[-1] -= 1
    return MixedSplit(tuple(devices[cut] for cut in cuts[:-1]), tuple(counts), tuple(loads))
