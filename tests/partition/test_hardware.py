"""Devices as a user writes them, and estimates by data sheet."""

from __future__ import annotations

import math

import pytest
import torch

from hf_ouroboros.errors import DeviceMapError
from hf_ouroboros.partition.facts import UnitFacts
from hf_ouroboros.partition.hardware import GIB, PRESETS, STEP_PASSES, DeviceKind, parse_devices


def test_forms() -> None:
    assert parse_devices(["rtx3090"]) == [PRESETS["rtx3090"]]
    assert parse_devices(["2xT4", "l4"]) == [PRESETS["t4"], PRESETS["t4"], PRESETS["l4"]]
    assert parse_devices(["2x3.5TFLOPS/24GB"]) == [DeviceKind("3.5tflops/24gb", 3.5e12, 3.5e12, math.inf, 24 * GIB)] * 2
    assert parse_devices(["cpu:0", "cpu:1"]) == ["cpu:0", "cpu:1"]
    assert parse_devices(["cuda"]) == ["cuda:0"]


@pytest.mark.parametrize("item", ["abacus", "2xcuda:0", "0x", "x4", ""])
def test_unknown_devices(item: str) -> None:
    with pytest.raises(DeviceMapError, match="is unknown; use \\[COUNTx\\]KIND with a kind of t4, v100"):
        parse_devices([item])


def test_no_devices() -> None:
    with pytest.raises(DeviceMapError, match="--devices is empty"):
        parse_devices([])
    with pytest.raises(DeviceMapError, match="--devices is empty"):
        parse_devices(["0xt4"])


def test_estimates() -> None:
    kind = DeviceKind("toy", half_flops=200.0, full_flops=100.0, bandwidth=10.0, memory=1.0)
    unit = UnitFacts(("h",), "layer", 10, 40, flops=1000.0, activation_bytes=30.0, output_bytes=5.0, plan_cost=1.0)
    assert kind.forward_seconds(unit, torch.float32) == pytest.approx(10 + (2 * 30 + 40) / 10)
    assert kind.forward_seconds(unit, torch.bfloat16) == pytest.approx(5 + (2 * 30 + 40) / 10)
    assert kind.step_seconds(unit) == pytest.approx(STEP_PASSES * 40 / 10)
