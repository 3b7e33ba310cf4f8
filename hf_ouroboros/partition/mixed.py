"""Runs of layers on any devices, several on one where that balances better: the mixed pipe of FTPipe (Eliad et al., 2021).

Six layers of work 4 1 1 4 1 1 on three devices, embedding and head on device 0 (the device of every layer, and the devices' work):

    4 stages    0 0 1 1 2 2    5 5 2
    5 stages    0 1 1 2 1 1    4 4 4

Many stages balance well; but each one delays the first stage's gradients by a tick more and sends two more messages per
micro-batch. `worth_it` weighs one with the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .balance import Load
from .sweeps import MixedSplit, Sweeps, keep_best

WORTH = 0.01
"""Share of the heaviest device's work that a further stage has to save."""

NEAR = 0.03
"""Most that the heaviest device may have above that of the best balance that was found."""

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Where between what nothing can undercut and what is known the bounds of sweeps lie."""


def worth_it(found: Mapping[int, MixedSplit]) -> MixedSplit:
    """Of the best splits by number of stages, the one of which every further stage saves its share of the heaviest device's work.

    It is never more than `NEAR` behind the best balance.
    """
    best = min(split.heaviest for split in found.values())
    near = {stages: split for stages, split in found.items() if split.heaviest <= best * (1 + NEAR)}
    return near[min(near, key=lambda stages: (near[stages].heaviest * (1 + WORTH) ** stages, stages))]


def mixed_splits(
    times: Sequence[Load],
    stages: Sequence[int],
    tied: bool,
    memory: Load | None = None,
    limits: Sequence[float] | None = None,
    known: MixedSplit | None = None,
) -> dict[int, MixedSplit]:
    """The best balanced split that is found, for every number of stages for which there is one.

    Args:
        times: of the stages on each device; one object for devices that are alike. Rows that differ from stage to stage ask for a
            single number of stages.
        stages: numbers of stages K, at least 2, in rising order.
        tied: whether the last stage has to be on the first one's device.
        memory: of the stages; None where there is room enough.
        limits: what fits into each device, in the unit of `memory`.
        known: a split, of any number of stages, to improve on; where it is as good as can be, it is all that is returned.
    """
    sweeps = Sweeps(times, stages, tied, memory, limits)
    found = {} if known is None else {len(known.placement): known}
    anywhere = sweeps.in_any_order()
    floor, ceiling = anywhere.heaviest, sweeps.everything if known is None else known.heaviest
    if len(stages) > 1:
        if ceiling <= floor * (1 + WORTH):
            return found
        if sweeps.allows(anywhere):
            keep_best(found, anywhere)
    while True:
        for share in SHARES:
            for split in sweeps.below(floor + share * (ceiling - floor)):
                keep_best(found, split)
            # More stages than those of a split that is as good as can be are not worth it.
            sweeps.bound_stages(
                min((k for k in found if found[k].heaviest <= floor * (1 + WORTH)), default=max(stages))
            )
        best = min((split.heaviest for split in found.values()), default=ceiling)
        if best >= ceiling * (1 - WORTH) or best <= floor * (1 + WORTH):
            return {k: sweeps.in_order(found[k]) for k in sorted(found)}
        ceiling = best


def best_in_any_order(times: Sequence[Load], tied: bool) -> MixedSplit:
    """The best balance that is found if neither the number of stages nor memory matters; arguments as of `mixed_splits`."""
    return Sweeps(times, [len(times[0].fixed)], tied, None, None).in_any_order()
