"""The best balance of layers over devices in any order: what no split into stages, however many they are, can undercut.

Layers are given to devices one by one, the largest first, each to where least is to be done by then; where there are few
layers, branch and bound tries other devices, too. How far it goes is counted in steps and not in seconds, so that all processes agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

STEPS = 20_000
"""Of the search."""

FEW = 64
"""Layers up to which it goes beyond the first answer."""


def unordered(times: Sequence[Sequence[float]], begun: Sequence[float]) -> list[int]:
    """The device of every layer in the best balance that is found.

    Args:
        times: [device][layer]: work of a layer on a device.
        begun: [device]: work that a device has anyway.
    """
    search = _Search(times, begun)
    search.give(0, list(begun))
    return search.best


class _Search:
    """See `unordered`."""

    def __init__(self, times: Sequence[Sequence[float]], begun: Sequence[float]):
        self._times = times
        layers = range(len(times[0]))
        least = [min(row[i] for row in times) for i in layers]
        self._order = sorted(layers, key=lambda i: (-least[i], i))
        alike: dict[tuple[float, ...], int] = {}
        self._kinds = [alike.setdefault(tuple(row), len(alike)) for row in times]
        self._floor = max((sum(begun) + sum(least)) / len(times), *begun)
        self._steps = 0
        self._given = [0] * len(layers)
        self.best: list[int] = []
        self._heaviest = math.inf
        if len(layers) > FEW:
            self._give_at_once(list(begun))

    def _give_at_once(self, loads: list[float]) -> None:
        for layer in self._order:
            device = self._least_busy_first(layer, loads)[0]
            loads[device] += self._times[device][layer]
            self._given[layer] = device
        self.best, self._heaviest, self._steps = list(self._given), max(loads), STEPS

    def give(self, count: int, loads: list[float]) -> None:
        """All ways to give what comes after the `count` largest layers, the most even one first."""
        if count == len(self._order):
            self.best, self._heaviest = list(self._given), max(loads)
            return
        layer, tried = self._order[count], set()
        for device in self._least_busy_first(layer, loads):
            if self._steps >= STEPS or self._heaviest <= self._floor * (1 + 1e-9):
                return
            before = loads[device]
            after = before + self._times[device][layer]
            if max(after, *loads) >= self._heaviest * (1 - 1e-9):
                return
            if (same := (self._kinds[device], before)) in tried:
                continue
            tried.add(same)
            self._steps += 1
            loads[device], self._given[layer] = after, device
            self.give(count + 1, loads)
            loads[device] = before

    def _least_busy_first(self, layer: int, loads: Sequence[float]) -> list[int]:
        return sorted(range(len(loads)), key=lambda device: (loads[device] + self._times[device][layer], device))
