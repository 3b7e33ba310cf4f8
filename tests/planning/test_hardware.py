"""Devices as a user writes them, and estimates by data sheet."""

from __future__ import annotations

import math

import pytest
import torch

from hf_ouroboros.errors import DeviceMapError, UnsupportedOptionError
from hf_ouroboros.partition import torch_device
from hf_ouroboros.planning.hardware import GIB, PRESETS, STEP_PASSES, DeviceKind, is_here, parse_devices
from hf_ouroboros.planning.unit_facts import UnitFacts


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


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("0xt4", "count='0' must be a whole number from 1 to 128"),
        ("1000000000xt4", "count='1000000000' must be"),
        (f"{'9' * 5000}xt4", "must be a whole number from 1 to 128"),
        ("0tflops/8gb", "tflops='0' must be a number of at least 0.001"),
        (f"{'9' * 400}tflops/8gb", "must be a number of at least 0.001"),
        ("10tflops/0gb", "gb='0' must be a number"),
    ],
)
def test_devices_that_nobody_has(item: str, message: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=message) as caught:
        parse_devices([item])
    assert len(str(caught.value)) < 500
    with pytest.raises(DeviceMapError, match="names 200 devices, more than 128"):
        parse_devices(["100xt4"] * 2)


def test_devices_that_are_here() -> None:
    assert is_here("cpu:0") and is_here("cpu:7")
    assert not any(
        is_here(name)
        for name in ("cpu", "cpu:", "cpu:x", "cpu:\u00b2", "cuda:99", "cuda:99/0", "tpu:0", f"cpu:{'9' * 5000}")
    )


def test_workers_may_share_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert is_here("cuda:0") and is_here("cuda:0/0") and is_here("cuda:0/7")
    assert not any(is_here(name) for name in ("cuda:1/0", "cuda:0/", "cuda:0/x", "cuda:/0", "cpu:0/1"))
    assert torch_device("cuda:0/7") == torch.device("cuda:0")


def test_estimates() -> None:
    kind = DeviceKind("toy", half_flops=200.0, full_flops=100.0, bandwidth=10.0, memory=1.0)
    unit = UnitFacts(("h",), "layer", 10, 40, flops=1000.0, activation_bytes=30.0, output_bytes=5.0, plan_cost=1.0)
    assert kind.forward_seconds(unit, torch.float32) == pytest.approx(10 + (2 * 30 + 40) / 10)
    assert kind.forward_seconds(unit, torch.bfloat16) == pytest.approx(5 + (2 * 30 + 40) / 10)
    assert kind.step_seconds(unit) == pytest.approx(STEP_PASSES * 40 / 10)
