"""Devices that a plan is made for, and how fast they are by their data sheets where they can't be measured."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import DeviceMapError
from ..options import Number, Whole, read_option, shown
from .unit_facts import UnitFacts

GIB = 2**30
# Of the peak, in the matrix products of transformer layers that are large enough.
UTILISATION = 0.5
# An optimizer step reads and writes weights, gradients and two moments, after a pass for the norm.
STEP_PASSES = 8


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device.

    Args:
        name: its preset, or what the user wrote.
        half_flops: sustained FLOPs per second in bf16 or fp16.
        full_flops: the same in float32.
        bandwidth: bytes per second of its memory.
        memory: bytes.
    """

    name: str
    half_flops: float
    full_flops: float
    bandwidth: float
    memory: float

    def forward_seconds(self, unit: UnitFacts, dtype: torch.dtype) -> float:
        """An estimate: the products at the sustained rate, then everything kept, or unpacked, written and read once."""
        rate = self.half_flops if dtype.itemsize == 2 else self.full_flops
        moved = 2 * unit.activation_bytes + unit.parameter_bytes + 2 * unit.unpacked_bytes
        return unit.flops / rate + moved / self.bandwidth

    def step_seconds(self, unit: UnitFacts) -> float:
        """An estimate for the optimizer step of a unit: bound by memory."""
        return STEP_PASSES * unit.trained / self.bandwidth


def _preset(name: str, half: float, full: float, bandwidth: float, memory: float) -> DeviceKind:
    """From the data sheet: peak teraFLOPs without sparsity, GB/s, GB."""
    return DeviceKind(name, half * 1e12 * UTILISATION, full * 1e12 * UTILISATION, bandwidth * 1e9, memory * GIB)


PRESETS = {
    kind.name: kind
    for kind in (
        _preset("t4", 65, 8.1, 320, 16),
        _preset("v100", 125, 15.7, 900, 32),
        _preset("l4", 121, 30.3, 300, 24),
        _preset("a10", 125, 31.2, 600, 24),
        _preset("rtx3090", 71, 35.6, 936, 24),
        _preset("rtx4090", 165, 82.6, 1008, 24),
        _preset("a100-40gb", 312, 19.5, 1555, 40),
        _preset("a100-80gb", 312, 19.5, 2039, 80),
        _preset("h100", 989, 67, 3350, 80),
        _preset("h200", 989, 67, 4800, 141),
    )
}
MOST_DEVICES = 128  # of a plan
_COUNT, _RATE, _MEMORY = Whole(1, MOST_DEVICES), Number(1e-3, 1e6), Number(1e-3, 1e6)
_ITEM = re.compile(r"(?:(?P<count>\d+)x)?(?P<what>.+)")
_OWN = re.compile(r"(?P<flops>\d+(?:\.\d+)?)tflops/(?P<memory>\d+(?:\.\d+)?)gb", re.IGNORECASE)
LOCAL = re.compile(r"(cpu|cuda|xpu|npu|mps)(:\d+)?")


def parse_devices(items: Sequence[str]) -> list[DeviceKind | str]:
    """Devices in worker order from what a user writes.

    Args:
        items: "rtx3090", "8xa100-40gb", "4x35tflops/24gb" (sustained, of a device that is no preset), or devices of
            this machine such as "cpu:0" and "cuda:1", which are to be measured and stay names.

    Raises:
        DeviceMapError, UnsupportedOptionError: none of these, or too many.
    """
    devices: list[DeviceKind | str] = []
    for item in items:
        match = _ITEM.fullmatch(item.strip().lower())
        what = match["what"] if match else item
        count = read_option(f"--devices {shown(item)}: count", match["count"] or 1, _COUNT) if match else 0
        if own := _OWN.fullmatch(what):
            rate = read_option(f"--devices {shown(item)}: tflops", own["flops"], _RATE) * 1e12
            memory = read_option(f"--devices {shown(item)}: gb", own["memory"], _MEMORY) * GIB
            devices += [DeviceKind(what, rate, rate, math.inf, memory)] * count
        elif what in PRESETS:
            devices += [PRESETS[what]] * count
        elif LOCAL.fullmatch(what) and count == 1:
            devices.append(what if ":" in what else f"{what}:0")
        else:
            raise DeviceMapError(
                f"--devices {shown(item)} is unknown; use [COUNTx]KIND with a kind of {', '.join(PRESETS)}, "
                "[COUNTx]35tflops/24gb for sustained speed and memory of another kind, or devices of this machine such "
                "as cpu:0 cpu:1 or cuda:0 cuda:1, which are measured"
            )
    if not devices:
        raise DeviceMapError("--devices is empty; name at least one, for example 4xrtx3090")
    if len(devices) > MOST_DEVICES:
        raise DeviceMapError(f"--devices names {len(devices)} devices, more than {MOST_DEVICES}; name fewer")
    return devices


def is_here(name: str) -> bool:
    """Whether this machine has a device with an index.

    Any number of cpu:i is here, they are threads; and any number of cuda:0/i where cuda:0 is, workers that share it.
    """
    kind, _, index = name.partition(":")
    if kind != "cpu" and "/" in index:
        index, _, worker = index.partition("/")
        if not worker.isdecimal() or len(worker) > 6:
            return False
    if not index.isdecimal() or len(index) > 6:
        return False
    if kind == "cpu":
        return True
    present = torch.accelerator.current_accelerator(check_available=True)
    return present is not None and present.type == kind and int(index) < torch.accelerator.device_count()
