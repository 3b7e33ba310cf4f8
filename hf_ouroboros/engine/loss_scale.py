"""The scale of losses in float16: decided from what became of updates long enough ago that nobody has to wait for them.

Gradients of activations are small, and float16 has nothing below 6e-8; so losses are multiplied by a scale S, a power of two, and
gradients divided by it, which is exact. Where S is too large, gradients overflow; where it could be larger, it is tried now and then.

torch.amp.GradScaler halves S after a step whose gradients had overflowed, and doubles it after 2000 steps in a row whose had not.
It looks at the newest step. Here, the stages close update v at different moments, and all have to compute with the same S, so the
scale of update u looks at the updates up to u - L; and it takes a span of D updates until the last gradient that was computed with
another scale is applied:

    L     1 in a synchronous schedule, else the updates after which the norms of an update are known to everybody without waiting
    D     0 in a synchronous schedule, else ceil((K-1)/M)

    S = 65536, good = 0, fence = 0
    when update u opens, for each v <= u - L that was not counted yet, in order, if v >= fence (others say nothing about S):
        if gradients of v have overflowed, on any stage     S <- S/2, good <- 0, fence <- u + D
        else if ++good = 2000                               S <- 2 S, good <- 0, fence <- u + D

With L = 1 and D = 0 that is GradScaler. With delays, K = 3 and M = 4, L = 5 and D = 1:

    update       0    1    2    3    4    5    6    7    8    9    10   11   12
    scale        S    S    S    S    S    S/2  S/2  S/2  S/2  S/2  S/2  S/2  ...
    overflows    x    x    x    x    x    x    .    .    .    .    .    .    ...
                 |                        |    '-- the first one that says something about S/2, heard by update 11
                 '-- heard by update 5    '-- of ticks of update 4, which are late
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

INITIAL = 65536.0
INTERVAL = 2000
"""What torch.amp.GradScaler begins with, and after how many good updates it doubles the scale."""

LARGEST = 2.0**127
"""Of the powers of two that float32 has."""


@dataclass(frozen=True)
class ScaleState:
    """A scale between updates, as a checkpoint holds it.

    Args:
        scale: S.
        good: updates in a row that were counted as good.
        fence: the first update that says something about S.
        counted: how many updates were counted.
        overflowed: those of the later ones that have overflowed.
    """

    scale: float
    good: int
    fence: int
    counted: int
    overflowed: list[int]

    @classmethod
    def read(cls, found: Any) -> ScaleState:
        """What JSON has made of it.

        Raises:
            ValueError: it is none, or damaged.
        """
        if not isinstance(found, Mapping) or found.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f"loss_scale is {found!r}")
        state = cls(**found)
        counts = [
            state.good,
            state.fence,
            state.counted,
            *(state.overflowed if isinstance(state.overflowed, list) else [-1]),
        ]
        if not isinstance(state.scale, float) or state.scale < 0 or any(type(n) is not int or n < 0 for n in counts):
            raise ValueError(f"loss_scale is {found!r}")
        return state


class LossScale:
    """The scale of a run, which engine and reference work with alike.

    Args:
        initial: the first scale, a power of two.
        interval: good updates in a row after which it is doubled.
        lag: L.
        span: D.
    """

    def __init__(self, initial: float, interval: int, lag: int, span: int):
        self._interval, self._lag, self._span = interval, lag, span
        self._scale, self._good, self._fence, self._counted = initial, 0, 0, 0
        self._overflowed: dict[int, bool] = {}  # what was heard of updates that are not counted yet
        self._used: dict[int, float] = {}  # the scales of updates that nothing was heard of

    def needed(self, update: int) -> int:
        """Of how many updates one has to have heard when an update opens."""
        return max(0, update - self._lag + 1)

    def open(self, update: int) -> float:
        """The scale of the losses of an update that opens."""
        while self._counted < self.needed(update):
            self._count(self._counted, self._overflowed.pop(self._counted), update)
            self._counted += 1
        self._used[update] = self._scale
        return self._scale

    def _count(self, update: int, overflowed: bool, opening: int) -> None:
        if update < self._fence:
            return
        self._good = 0 if overflowed else self._good + 1
        if overflowed or self._good == self._interval:
            self._scale = self._scale / 2 if overflowed else min(self._scale * 2, LARGEST)
            self._good, self._fence = 0, opening + self._span

    def hear(self, update: int, overflowed: bool) -> float:
        """Takes note of what has become of an update, in order; the scale that its losses had."""
        self._overflowed[update] = overflowed
        return self._used.pop(update)

    def has_overflowed(self, update: int) -> bool:
        """Whether gradients of the newest update have overflowed, which was heard of."""
        return self._overflowed[update]

    def state(self) -> ScaleState:
        """Between updates, when all of them were heard of."""
        overflowed = [update for update, found in self._overflowed.items() if found]
        return ScaleState(self._scale, self._good, self._fence, self._counted, overflowed)

    def resume(self, update: int, state: ScaleState | None) -> None:
        """Goes on after so many updates; without a state, as a run that begins there."""
        if state is None:
            self._fence = self._counted = update
            return
        self._scale, self._good, self._fence, self._counted = state.scale, state.good, state.fence, state.counted
        self._overflowed = {u: u in state.overflowed for u in range(state.counted, update)}
