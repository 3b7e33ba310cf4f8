"""FSDP, simulated: every device has a part of every layer, gathers each layer when it is needed, and has micro-batches of its own.

An update's M micro-batches are shared by D devices. For each of its M / D, a device needs every layer twice, in the forward and
in the backward, and everything else (embedding, head) once. In the last backward of an update gradients are averaged, and every
device steps its part of the weights:

    computing   | layer 0 forward    | layer 1 forward    | ...
    link        | gather layer 1     | gather layer 2     | ...       the next layer is gathered while one is computed

To gather S bytes, and to reduce S bytes of gradients, takes D - 1 steps around a ring, over links of b bytes per second with a
latency of a seconds:

    (D - 1) (S / (D b) + a)

Sources: the ring algorithms in Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005;
what is gathered and when: ZeRO's third stage, arXiv 1910.02054, section 7, and FSDP, arXiv 2304.11277, sections 3.2 and 3.3. All that
was left open there is taken in favour of FSDP: a link sends and receives at full speed at the same time, gradients are averaged once
per update (which keeps those of the whole model on every device until then), and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .links import Links
from .simulator import Simulation
from .timeline import Event, Timeline

FSDP, COLOUR = "fsdp", "#b5547f"


@dataclass(frozen=True)
class ShardedUnit:
    """A run of modules and its parameters.

    Args:
        forward: seconds of a micro-batch's forward, on every device.
        backward: seconds of its backward, on every device.
        step: seconds of an optimizer step of all its parameters, on every device.
        parameter_bytes: what is gathered.
        gradient_bytes: what is averaged in every update.
        is_layer: whether it is gathered by itself and given away behind its forward; else it is gathered with all others of
            this sort, and stays from a micro-batch's first forward to its last backward.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    step: Sequence[float]
    parameter_bytes: float
    gradient_bytes: float
    is_layer: bool


class _Run:
    """All devices at work for an update, and the links between them, which carry one thing at a time.

    Args:
        units: in execution order.
        share: micro-batches of a device per update.
        links: connections.
        replicas: R, each of as many devices; its parts of the gradients are averaged with the others'.
    """

    def __init__(
        self, units: Sequence[ShardedUnit], share: int, links: Links, replicas: int, names: Sequence[str] | None
    ):
        self.units, self.share, self.links, self.replicas = units, share, links, replicas
        self.devices = len(units[0].forward)
        self.timeline = Timeline(self.devices, names)
        self.free = [0.0] * self.devices
        self._link_free = 0.0
        self._open: list[Event | None] = [None] * self.devices
        ends = [unit for unit in units if not unit.is_layer]
        self._end_bytes = sum(unit.parameter_bytes for unit in ends), sum(unit.gradient_bytes for unit in ends)

    def update(self) -> float:
        """All micro-batches of an update, and its step; returns when all is done. The next one would do the same again."""
        for turn in range(self.share):
            self._micro_batch(turn, turn == self.share - 1)
        ready = max(max(self.free), self._link_free)
        for device in range(self.devices):
            self.free[device] = ready
            self._work(device, "step", 0, math.fsum(unit.step[device] for unit in self.units) / self.devices)
        for event in self._open:
            if event is not None:
                self.timeline.record(event)
        return max(self.free)

    def _micro_batch(self, number: int, averages: bool) -> None:
        """Forwards and backwards of every device's next micro-batch."""
        there = self._send(self._gathering(self._end_bytes[0]), max(self.free))
        work = [(unit, "forward") for unit in self.units] + [(unit, "backward") for unit in reversed(self.units)]
        for (unit, kind), following in zip(work, [*work[1:], None], strict=True):
            for device in range(self.devices):
                self.free[device] = max(self.free[device], there)
            # The next one is gathered while this one is computed.
            if following is not None and following[0].is_layer:
                there = self._send(self._gathering(following[0].parameter_bytes), max(self.free))
            for device in range(self.devices):
                self._work(device, kind, number * self.devices + device, getattr(unit, kind)[device])
            if averages and kind == "backward" and unit.is_layer:
                self._send(self._reducing(unit.gradient_bytes), max(self.free))
        if averages:
            self._send(self._reducing(self._end_bytes[1]), max(self.free))

    def _gathering(self, size: float) -> float:
        return self.links.ring(self.devices, size)

    def _reducing(self, size: float) -> float:
        return self._gathering(size) + self.links.mean_over(self.replicas, size / self.devices)

    def _send(self, seconds: float, ready: float) -> float:
        """When something that all devices are ready for has been gathered or reduced."""
        if seconds:
            self._link_free = max(self._link_free, ready) + seconds
            return self._link_free
        return ready

    def _work(self, device: int, kind: str, index: int, seconds: float) -> None:
        """A device computes; what follows without a gap is one event."""
        start = self.free[device]
        self.free[device] = end = start + seconds
        before = self._open[device]
        if before is not None and (before.kind, before.index, before.end) == (kind, index, start):
            start = before.start
        elif before is not None:
            self.timeline.record(before)
        self._open[device] = Event(device, 0, kind, index, start, end)


def simulate_sharded(
    units: Sequence[ShardedUnit],
    micro_batches: int,
    *,
    links: Links | None = None,
    replicas: int = 1,
    kept_bytes: float = 0.0,
    device_names: Sequence[str] | None = None,
) -> Simulation:
    """Simulates an update under FSDP.

    Args:
        units: in execution order, with times of every device.
        micro_batches: M, of an update of all devices together.
        links: connections between devices; None for none that take time.
        replicas: R, each of as many devices (FSDP within, and an average over them).
        kept_bytes: what a device keeps from a micro-batch's forwards to its backwards.
        device_names: for the timeline.

    Raises:
        ValueError: the devices can't have equally many micro-batches.
    """
    devices = len(units[0].forward)
    if micro_batches < 1 or micro_batches % devices:
        raise ValueError(
            f"{FSDP}: {micro_batches} micro-batches can't be shared equally by {devices} devices; use a multiple of {devices}"
        )
    run = _Run(units, micro_batches // devices, links or Links(), replicas, device_names)
    end = run.update()
    per_tick = [
        math.fsum(unit.forward[d] + unit.backward[d] + unit.step[d] / micro_batches for unit in units)
        for d in range(devices)
    ]
    return Simulation(
        FSDP,
        run.timeline,
        end / micro_batches,
        run.timeline.forward_ends()[0],
        tuple(run.timeline.busy_shares(0.0, end)),
        (1,) * devices,
        (kept_bytes,) * devices,
        math.fsum(per_tick) / devices,
    )
