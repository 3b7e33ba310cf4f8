"""`device_map="mixed"`: how many stages, and where, and why; from multiply-adds, so that all processes and all resumed runs choose alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .balance import Load, NoSplitError, best_counts
from .mixed import NEAR, WORTH, mixed_splits, worth_it
from .sweeps import MixedSplit

SHOWN = 4
"""Other numbers of stages that a reason names."""


@dataclass(frozen=True)
class Row:
    """What of a model is split: work and bytes, the same on all devices and in all stages.

    Args:
        time: work of every layer.
        memory: bytes of every layer.
        ends: work of what comes before the layers, and of what comes after them.
        end_bytes: bytes of the same.
        tied: whether both have to be on one device.
    """

    time: Sequence[float]
    memory: Sequence[float]
    ends: tuple[float, float]
    end_bytes: tuple[float, float]
    tied: bool

    def times(self, stages: int) -> Load:
        """Work of so many stages."""
        return _load(self.time, self.ends, stages)

    def sizes(self, stages: int) -> Load:
        """Bytes of so many stages."""
        return _load(self.memory, self.end_bytes, stages)

    def split(self, placement: Sequence[int], counts: Sequence[int], devices: int) -> MixedSplit:
        """A split, and the work of its devices."""
        loads, layer = [0.0] * devices, 0
        loads[placement[0]] += self.ends[0]
        for device, count in zip(placement, counts, strict=True):
            loads[device] += sum(self.time[layer : layer + count])
            layer += count
        loads[placement[-1]] += self.ends[1]
        return MixedSplit(tuple(placement), tuple(counts), tuple(loads))


def _load(layers: Sequence[float], ends: tuple[float, float], stages: int) -> Load:
    fixed = [0.0] * stages
    fixed[0] += ends[0]
    fixed[-1] += ends[1]
    return Load([layers] * stages, fixed)


def choose_mixed(
    row: Row, contiguous: Sequence[int], devices: int, limits: Sequence[float], num_stages: int | None
) -> tuple[MixedSplit, str]:
    """Weighs balance against the delay and the messages of further stages; returns the split, and the reason.

    Args:
        row: what is split.
        contiguous: device of every stage where each device has one run of layers, the first and the last stage perhaps together.
        devices: how many there are.
        limits: bytes that fit into each device.
        num_stages: K; None to choose it.

    Raises:
        NoSplitError: nothing fits.
    """
    layers, fewest = len(row.time), len(contiguous)
    most = max(fewest, min(layers + 2, 3 * fewest + 8))  # long rows balance well without many stages
    stages = list(range(fewest, most + 1)) if num_stages is None else [num_stages]
    known = None
    if fewest in stages:
        try:
            counts = best_counts(contiguous, row.times(fewest), row.sizes(fewest), limits)
            known = row.split(contiguous, counts, devices)
        except NoSplitError:
            pass
    if stages[-1] == 1 or devices == 1:
        if known is None:
            raise NoSplitError("the model does not fit into one device")
        return known, "mixed: all layers are on one device"
    time, memory = row.times(stages[-1]), row.sizes(stages[-1])
    found = mixed_splits([time] * devices, stages, row.tied, memory, limits, known)
    if not found:
        raise NoSplitError("no split was found that fits into the devices")
    split = worth_it(found)
    return split, _reason(split, found, asked=num_stages is not None)


def least_full(row: Row, devices: int, limits: Sequence[float], num_stages: int | None) -> dict[int, float]:
    """Bytes on every device under the split that fills devices least, relative to what fits into them; nothing if there is none."""
    if devices == 1 or num_stages == 1:
        return {0: sum(row.memory) + sum(row.end_bytes)}
    most = num_stages or min(len(row.time) + 2, 3 * devices + 8)
    shares = [1 / max(limit, 1) for limit in limits]
    loads = [
        _load([size * s for size in row.memory], (row.end_bytes[0] * s, row.end_bytes[1] * s), most) for s in shares
    ]
    found = mixed_splits(loads, [most] if num_stages else list(range(2, most + 1)), row.tied)
    if not found:
        return {}
    best = min(found.values(), key=lambda split: split.heaviest)
    return {device: load / share for device, (load, share) in enumerate(zip(best.loads, shares, strict=True))}


def _reason(split: MixedSplit, found: Mapping[int, MixedSplit], asked: bool) -> str:
    mean = math.fsum(split.loads) / len(split.loads)
    chosen = len(split.placement)
    text = f"mixed: the busiest device has {split.heaviest / mean:.3f} times the mean work in {chosen} stages"
    if asked:
        return f"{text}, as many as asked for"
    others = sorted(found.keys() - {chosen}, key=lambda k: (k != min(found), abs(k - chosen), k))[:SHOWN]
    if not others:
        return f"{text}; more would not save {WORTH:.0%} of it"
    compared = ", ".join(f"{found[k].heaviest / mean:.3f} in {k}" for k in sorted(others))
    return (
        f"{text} ({compared}); one stage more is a tick more of delay and two messages more per micro-batch, and has to save "
        f"{WORTH:.0%}, unless the best balance is {NEAR:.0%} away"
    )
