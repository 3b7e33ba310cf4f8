"""What it takes to send something from one device to another: latency and bandwidth, within a host and between hosts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..schedules.replay import Message


@dataclass(frozen=True)
class Links:
    """The connections of a row of devices; each pair has one of its own, in each direction.

    Args:
        bandwidth: bytes per second between two devices of a host.
        latency: seconds until the first byte is there.
        devices_per_host: neighbours that share a host; None for a single host.
        host_bandwidth: bytes per second between hosts; None for `bandwidth`.
        host_latency: seconds between hosts; None for `latency`.

    Raises:
        ValueError: if a bandwidth is not positive, a latency negative, or a host without devices.
    """

    bandwidth: float = math.inf
    latency: float = 0.0
    devices_per_host: int | None = None
    host_bandwidth: float | None = None
    host_latency: float | None = None

    def __post_init__(self) -> None:
        for name in ("bandwidth", "host_bandwidth"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive (bytes per second)")
        for name in ("latency", "host_latency"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"{name}={value} must not be negative (seconds)")
        if self.devices_per_host is not None and self.devices_per_host < 1:
            raise ValueError(f"devices_per_host={self.devices_per_host} must be at least 1")

    def message(self, source: int, target: int, size: float) -> Message:
        """What it takes to send `size` bytes from one device to another."""
        bandwidth, latency = self.bandwidth, self.latency
        if self.devices_per_host is not None and source // self.devices_per_host != target // self.devices_per_host:
            bandwidth = self.host_bandwidth or bandwidth
            latency = latency if self.host_latency is None else self.host_latency
        return Message(size / bandwidth, latency)

    def ring(self, devices: int, size: float) -> float:
        """Seconds to gather `size` bytes, of which each of so many neighbours has a part, around a ring over the slowest link in it.

        To sum up as many bytes so that each has a part of the result takes as long.
        """
        several = self.devices_per_host is not None and devices > self.devices_per_host
        bandwidth = min(self.bandwidth, self.host_bandwidth or math.inf) if several else self.bandwidth
        latency = max(self.latency, self.host_latency or 0.0) if several else self.latency
        return (devices - 1) * (size / devices / bandwidth + latency) if size else 0.0

    def mean_over(self, replicas: int, size: float) -> float:
        """Seconds to average `size` bytes over replicas around a ring, over the slowest kind of link there is."""
        if replicas == 1:
            return 0.0
        bandwidth = min(self.bandwidth, self.host_bandwidth or math.inf)
        latency = max(self.latency, self.host_latency or 0.0)
        return 2 * (replicas - 1) * (size / replicas / bandwidth + latency)
