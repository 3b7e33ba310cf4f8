"""The planner: as good as the best of all splits, within memory, and with advice where nothing fits."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from helpers import tiny_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory_model import toy

from hf_ouroboros.errors import DeviceMapError
from hf_ouroboros.partition import split_model
from hf_ouroboros.planning.hardware import PRESETS
from hf_ouroboros.planning.memory_model import MemoryOptions, stage_memory
from hf_ouroboros.planning.planner import PlannedDevice, UnitTimes, estimated, plan_split
from hf_ouroboros.planning.unit_facts import ModelFacts, model_facts


def device(name: str, forward: float, memory: float = math.inf, units: int = 9) -> PlannedDevice:
    """Every unit takes as long."""
    return PlannedDevice(name, (UnitTimes(forward, 2 * forward, 0.5 * forward),) * units, memory)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(300, 4000)), min_size=2, max_size=4),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
    st.data(),
)
def test_no_split_is_better(
    kinds: list[tuple[int, int]], tied: bool, recompute: bool, micro_batches: int, data: st.DataObject
) -> None:
    """Unlike devices, unlike units, the memory of a real stage: against all splits, added up without the planner."""
    facts = toy(tied=20 if tied else 0)
    slow = data.draw(st.lists(st.integers(1, 5), min_size=9, max_size=9))
    devices = [
        PlannedDevice(f"device {i}", tuple(UnitTimes(s * w, 2 * s * w, w) for w in slow), memory)
        for i, (s, memory) in enumerate(kinds)
    ]
    options = MemoryOptions("pipelined", micro_batches, recompute)
    stages = len(devices) + tied
    placement = [*range(len(devices)), 0][:stages]
    best = math.inf
    for cuts in combinations(range(1, 7), stages - 1):
        bounds = [0, *(cut + 1 for cut in cuts), 9]  # in units; the embedding comes first
        seconds, memory = [0.0] * len(devices), [0.0] * len(devices)
        for k, (d, start, stop) in enumerate(zip(placement, bounds, bounds[1:], strict=False)):
            times = devices[d].times[start:stop]
            again = recompute and k < stages - 1
            seconds[d] += sum(t.forward * (1 + again) + t.backward + t.step / micro_batches for t in times)
            memory[d] += stage_memory(facts, facts.units[start:stop], k, stages, options).total
        if all(m <= one.memory for m, one in zip(memory, devices, strict=True)):
            best = min(best, max(seconds))
    try:
        plan = plan_split(facts, devices, options)
    except DeviceMapError:
        assert best == math.inf
        return
    busiest = max(
        sum(s.forward + s.backward + s.step / micro_batches for s in plan.stages if s.device == d)
        for d in range(len(devices))
    )
    assert busiest == pytest.approx(best)
    assert all(plan.bytes_on(d) <= one.memory * (1 + 1e-9) for d, one in enumerate(devices))


def test_the_map_gives_the_same_stages_to_the_trainer() -> None:
    model = tiny_gpt2()
    facts = model_facts(model.config, 2, 8)
    plan = plan_split(facts, [estimated(facts, PRESETS[k]) for k in ("t4", "rtx3090", "t4")], MemoryOptions())
    split = split_model(model, ["cpu:0", "cpu:1", "cpu:2"], plan.device_map())
    assert split.plan.placement == plan.placement == (0, 1, 2, 0)
    assert tuple(row.layers for row in split.plan.rows) == plan.counts
    assert split.plan.delays == tuple(stage.delay for stage in plan.stages)
    assert [row.cost for row in split.plan.rows] == [sum(u.plan_cost for u in s.units) for s in plan.stages]
    assert [row.parameters for row in split.plan.rows] == [sum(u.parameters for u in s.units) for s in plan.stages]


def test_fast_devices_get_more() -> None:
    plan = plan_split(toy(tied=0), [device("slow", 3.0), device("fast", 1.0)], MemoryOptions())
    assert plan.counts == (1, 5)
    assert plan.stages[1].backward == 2 * plan.stages[1].forward


def test_recompute_replays_all_but_the_last_stage() -> None:
    devices = [device("a", 1.0), device("b", 1.0)]
    plan = plan_split(toy(tied=0), devices, MemoryOptions(recompute=True))
    assert plan.stages[0].backward == 3 * plan.stages[0].forward
    assert plan.stages[1].backward == 2 * plan.stages[1].forward


def giants(batch: int = 4) -> ModelFacts:
    """Six layers of half a gigabyte or more, with much activation."""
    units = [
        replace(
            u,
            parameter_bytes=u.parameter_bytes << 26,
            activation_bytes=u.activation_bytes * 2**25 * batch,
            output_bytes=2.0**20,
        )
        for u in toy(tied=0).units
    ]
    return replace(toy(tied=0), units=tuple(units), batch=batch)


@pytest.mark.parametrize(
    ("memory", "options", "message"),
    [
        (24, MemoryOptions(), r"does not fit into 3 devices with micro-batches of 4 x 1 tokens: even the split with the most "
         r"even memory needs \d+\.\d GiB on device \d \(card\), where 24.0 GiB may be used. It would fit with"),
        (50, MemoryOptions(), r"It would fit with .*recompute \(\d+\.\d GiB\)"),
        (30, MemoryOptions(), r"It would fit with micro-batches of 1 row \(\d+\.\d GiB\)"),
        (40, MemoryOptions(), r", or 4 devices with recompute"),
        (1, MemoryOptions(), "Nothing makes room on up to 64 such devices"),
    ],
)  # fmt: skip
def test_advice(memory: float, options: MemoryOptions, message: str) -> None:
    devices = [device("card", 1.0, memory * 2**30)] * 3
    with pytest.raises(DeviceMapError, match=message):
        plan_split(giants(), devices, options)


def test_what_is_advised_fits() -> None:
    devices = [device("card", 1.0, 50 * 2**30)] * 3
    plan_split(giants(), devices, MemoryOptions(recompute=True))
    plan_split(giants().for_batch(2), devices, MemoryOptions())
    devices = [device("card", 1.0, 40 * 2**30)] * 3
    plan_split(giants().for_batch(1), devices, MemoryOptions())
    plan_split(giants(), [*devices, devices[0]], MemoryOptions(recompute=True))


def test_too_many_stages() -> None:
    with pytest.raises(DeviceMapError, match="num_stages=9 is more than the model's 6 layers and head"):
        plan_split(toy(), [device("a", 1.0)] * 2, MemoryOptions(), num_stages=9)


def test_estimates_of_unlike_precision() -> None:
    config = tiny_gpt2().config
    full, half = model_facts(config, 2, 8), model_facts(config, 2, 8, torch.bfloat16)
    slow, fast = estimated(full, PRESETS["t4"]), estimated(half, PRESETS["t4"])
    assert all(s.forward >= f.forward for s, f in zip(slow.times, fast.times, strict=True))
    assert slow.memory == pytest.approx(0.9 * 16 * 2**30)
