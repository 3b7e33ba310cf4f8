"""Plans with stages anywhere: within memory, better balanced, and with no more stages than are worth it in a simulation."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import tiny_gpt2
from test_memory_model import toy

from hf_ouroboros.cli import main
from hf_ouroboros.commands.prediction import fewest_stages
from hf_ouroboros.errors import DeviceMapError
from hf_ouroboros.partition import split_model
from hf_ouroboros.planning.memory_model import MemoryOptions
from hf_ouroboros.planning.mixed_plan import mixed_plans
from hf_ouroboros.planning.planner import PlannedDevice, SplitPlan, UnitTimes, plan_split
from hf_ouroboros.simulate.links import Links

UNEVEN = (0.0, 4.0, 1.0, 1.0, 4.0, 1.0, 1.0, 0.0, 0.1)


def device(memory: float = math.inf, speed: float = 1.0) -> PlannedDevice:
    """Layers of unlike length."""
    times = tuple(UnitTimes(t / speed, 2 * t / speed, 0.01) for t in UNEVEN)
    return PlannedDevice("card", times, memory)


def busiest(plan: SplitPlan) -> float:
    """Seconds of the busiest device per micro-batch."""
    share = plan.options.micro_batches
    return max(
        sum(s.forward + s.backward + s.step / share for s in plan.stages if s.device == d)
        for d in range(len(plan.devices))
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [0, 20])
def test_more_stages_balance_better(tied: int, recompute: bool) -> None:
    facts, options = toy(tied=tied), MemoryOptions(micro_batches=4, recompute=recompute)
    plans = mixed_plans(facts, [device()] * 3, options)
    contiguous = plan_split(facts, [device()] * 3, options)
    assert busiest(plans[len(contiguous.stages)]) <= busiest(contiguous) * (1 + 1e-9)
    assert min(map(busiest, plans.values())) < busiest(contiguous) * 0.95
    for stages, plan in plans.items():
        assert len(plan.stages) == stages and sum(plan.counts) == facts.layers
        assert all(a != b for a, b in pairwise(plan.placement)) and set(plan.placement) == {0, 1, 2}
        assert not tied or plan.placement[0] == plan.placement[-1]


def test_plans_keep_to_memory() -> None:
    facts, options = toy(tied=20), MemoryOptions(micro_batches=2)
    free = mixed_plans(facts, [device()] * 3, options)
    need = min(max(plan.bytes_on(d) for d in range(3)) for plan in free.values())
    for share in (1.0, 0.95, 0.8):
        limit = need * share
        try:
            plans = mixed_plans(facts, [device(limit)] * 3, options)
        except DeviceMapError as error:
            assert "does not fit into 3 devices" in str(error)
            continue
        assert all(plan.bytes_on(d) <= limit * (1 + 1e-9) for plan in plans.values() for d in range(3))
    with pytest.raises(DeviceMapError, match="does not fit into 3 devices"):
        mixed_plans(facts, [device(10.0)] * 3, options)


def test_unlike_devices() -> None:
    plans = mixed_plans(toy(tied=0), [device(), device(speed=3.0)], MemoryOptions())
    best = min(plans.values(), key=busiest)
    assert busiest(best) == pytest.approx(9.0, rel=0.05)  # 36 s of work at speeds 1 and 3


def test_the_fewest_that_are_fast() -> None:
    plans = mixed_plans(toy(tied=0), [device()] * 3, MemoryOptions(micro_batches=4))
    plan, speeds = fewest_stages(plans, "pipelined", Links())
    assert list(speeds) == sorted(plans) and speeds[len(plan.stages)] >= 0.99 * max(speeds.values())
    assert all(speed < 0.99 * max(speeds.values()) for k, speed in speeds.items() if k < len(plan.stages))
    assert speeds[len(plan.stages)] > 1.05 * speeds[min(speeds)]
    assert len(fewest_stages(plans, "pipelined", Links(1e-1))[0].stages) == min(plans), "messages of a minute"


def test_as_many_stages_as_asked_for() -> None:
    assert list(mixed_plans(toy(tied=0), [device()] * 3, MemoryOptions(), num_stages=6)) == [6]
    with pytest.raises(DeviceMapError, match="num_stages=2: no split of 6 layers into so many stages on 3 devices"):
        mixed_plans(toy(), [device()] * 3, MemoryOptions(), num_stages=2)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_gpt2(layers=7).config.save_pretrained(tmp_path / "model")
    output = tmp_path / "mine"
    shape = ["--batch", "2", "--seq", "8", "--micro_batches", "4", "--device_map", "mixed", "--latency", "0"]
    given = ["plan", str(tmp_path / "model"), "--devices", "4tflops/8gb", "2x3tflops/8gb", *shape]
    assert main([*given, "--output", str(output)]) == 0
    assert "stages, the fewest that are simulated within 1% of the fastest; of its speed: " in capsys.readouterr().out
    assert main([*given, "--num_stages", "6", "--output", str(output)]) == 0
    assert "mixed: 6 stages" in capsys.readouterr().out
    found = json.loads(output.with_suffix(".json").read_text())
    split = split_model(tiny_gpt2(layers=7), ["cpu:0", "cpu:1", "cpu:2"], str(output.with_suffix(".json")))
    assert split.plan.num_stages == 6 and split.plan.placement[-1] == split.plan.placement[0]
    assert {name: int(place.rpartition(":")[2]) for name, place in split.plan.device_map().items()} == found
