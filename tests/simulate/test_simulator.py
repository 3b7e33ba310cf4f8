"""The simulator: closed formulas, links, replicas, memory, and the order of real runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import Case, Run, causal_loss
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_ouroboros.engine.core import Engine
from hf_ouroboros.engine.settings import EngineSettings
from hf_ouroboros.partition import Partition
from hf_ouroboros.simulate.links import Links
from hf_ouroboros.simulate.peers import PEERS, peer_placement
from hf_ouroboros.simulate.simulator import (
    MEASURED_TICKS,
    StageCost,
    as_timeline,
    execute,
    ideal_speedup,
    ours,
    run_programs,
    simulate,
)
from hf_ouroboros.simulate.timeline import Timeline

GRID = list(itertools.product([2, 4, 8, 16], [1, 4, 8]))


def snake(devices: int, last: float = 0.0) -> tuple[list[int], list[StageCost]]:
    """Stages of a tied model on equal devices, forward 1 and backward 2 per device; the last stage has `last` of it."""
    shares = [1.0 - last, *[1.0] * (devices - 1), last]
    return [*range(devices), 0], [StageCost(share, 2 * share) for share in shares]


# ---- closed formulas (balanced, backward = 2 x forward) ----


@pytest.mark.parametrize(("devices", "micro_batches"), GRID)
def test_pipelined_is_linear(devices: int, micro_batches: int) -> None:
    for last in (0.0, 0.25, 0.5):
        found = simulate("pipelined", *snake(devices, last), micro_batches)
        assert found.speedup == pytest.approx(devices)
        assert found.busy_shares == pytest.approx([1.0] * devices)


@pytest.mark.parametrize(("devices", "micro_batches"), GRID)
def test_lockstep_never_reaches_3(devices: int, micro_batches: int) -> None:
    found = simulate("lockstep", *snake(devices, 0.5), micro_batches)
    assert found.speedup == pytest.approx(3 / (1 + 2 / devices))


@pytest.mark.parametrize(("devices", "micro_batches"), GRID)
def test_1f1b_has_a_bubble(devices: int, micro_batches: int) -> None:
    found = simulate("1f1b", *snake(devices), micro_batches)
    assert found.speedup == pytest.approx(micro_batches * devices / (micro_batches + devices - 1))


@pytest.mark.parametrize("name", PEERS)
def test_peers(name: str) -> None:
    devices, m = 4, 8
    placement = peer_placement(name, devices)
    part = devices / len(placement)
    found = simulate(name, placement, [StageCost(part, 2 * part)] * len(placement), m)
    update = {
        "naive": 3 * m * 4,
        "gpipe": 3 * (m + 3),
        "interleaved": 3 * (m + 1.5),
        "zb-h1": 3 * m + 3,
        "zb-v": 3 * m,
        "dualpipev": 3 * m + 1.5,
    }[name]
    assert found.speedup == pytest.approx(3 * m * devices / update)


def test_untied_stages_on_devices_of_their_own() -> None:
    found = simulate("pipelined", range(4), [StageCost(1.0, 2.0)] * 4, 2)
    assert found.speedup == pytest.approx(4)
    assert found.fill_seconds == pytest.approx(4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(1, 5), st.sampled_from(ours()))
@example([1, 9, 1, 7], 1, "pipelined")  # the first device catches up with the second for longer than the run
def test_never_faster_than_the_busiest_device(costs: list[int], micro_batches: int, schedule: str) -> None:
    stages = [StageCost(c, 2 * c, step=1.0) for c in costs]
    placement = [*range(len(costs) - 1), 0]
    found = simulate(schedule, placement, stages, micro_batches)
    assert found.speedup <= ideal_speedup(placement, stages, micro_batches) * (1 + 1e-9)


# ---- links, replicas, memory ----


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_messages_between_stages(devices: int) -> None:
    """Up through n neighbours and down again takes n periods of work and 2(n-1) messages, and has n periods of time.

    Where the first device has the last stage too, loops through it have a period more, so n is one less there.
    """
    links = Links(latency=0.1)
    # Such a loop repeats every n ticks; the ticks measured are no multiple, so a message or two may be cut off.
    cut = 2 * 0.1 / MEASURED_TICKS
    untied = simulate("pipelined", range(devices), [StageCost(1.0, 2.0)] * devices, 1, links=links)
    assert untied.seconds_per_tick == pytest.approx(3 + 2 * (devices - 1) / devices * 0.1, abs=cut)
    tied = simulate("pipelined", *snake(devices, 0.5), 1, links=links)
    assert tied.seconds_per_tick == pytest.approx(3 + 2 * (devices - 2) / (devices - 1) * 0.1, abs=cut)


def test_a_link_slower_than_the_devices_sets_the_pace() -> None:
    costs = [StageCost(1.0, 2.0, boundary_bytes=10.0)] * 4
    # Two stages each: a device sends one output and one gradient per tick to the other, 10 bytes at 2 bytes per second.
    slow = simulate("pipelined", [0, 1, 0, 1], costs, 1, links=Links(bandwidth=1.0))
    assert slow.seconds_per_tick >= 30.0
    fast = simulate("lockstep", [0, 1, 2, 3], costs, 1, links=Links(bandwidth=10.0, latency=0.5))
    assert fast.seconds_per_tick == pytest.approx(4 + 3 * 1.5 + 2)  # up, with three messages on the way, and backwards


def test_lockstep_waits_for_every_message() -> None:
    placement, costs = snake(4, 0.5)
    plain = simulate("lockstep", placement, costs, 4).seconds_per_tick
    assert simulate("lockstep", placement, costs, 4, links=Links(latency=0.1)).seconds_per_tick == pytest.approx(
        plain + 4 * 0.1
    )


def test_hosts() -> None:
    placement, costs = snake(4, 0.5)
    links = Links(latency=0.1, devices_per_host=2, host_latency=1.0)
    plain = simulate("lockstep", placement, costs, 4).seconds_per_tick
    # 0 -> 1 and 2 -> 3 within a host, 1 -> 2 and 3 -> 0 between hosts
    assert simulate("lockstep", placement, costs, 4, links=links).seconds_per_tick == pytest.approx(plain + 2 * 1.1)


def test_replicas_average_before_every_step() -> None:
    costs = [StageCost(1.0, 2.0, gradient_bytes=8.0)] * 2
    found = simulate("pipelined", [0, 1], costs, 4, links=Links(bandwidth=4.0), replicas=2)
    assert found.seconds_per_tick == pytest.approx(
        3.0 + 2.0 / 4
    )  # 8 bytes to and fro at 4 bytes per second, per update


def test_steps_count_once_per_update() -> None:
    costs = [StageCost(1.0, 2.0, step=4.0)] * 2
    assert simulate("pipelined", [0, 1], costs, 4).seconds_per_tick == pytest.approx(4.0)


def test_in_flight() -> None:
    costs = [StageCost(1.0, 2.0, activation_bytes=10.0**k) for k in range(4)]
    found = simulate("pipelined", range(4), costs, 1)
    # Stage k waits K-1-k ticks for its gradient, and has one more in its hands.
    assert found.ticks_in_flight == (4, 3, 2, 1)
    assert found.bytes_in_flight == (4.0, 30.0, 200.0, 1000.0)
    assert simulate("gpipe", range(4), costs, 6).ticks_in_flight == (6, 6, 6, 6)
    assert simulate("zb-h1", range(4), costs, 6).ticks_in_flight == (4, 4, 4, 4)
    assert simulate("naive", range(4), costs, 6).ticks_in_flight == (1, 1, 1, 1)


def test_timeline_of_zero_bubble_shows_weight_gradients() -> None:
    found = simulate("zb-h1", range(2), [StageCost(1.0, 2.0)] * 2, 2)
    assert {event.kind for event in found.timeline.events} == {"forward", "backward", "weights", "step"}


def test_wrong_input_is_named() -> None:
    cost = StageCost(1.0, 2.0)
    with pytest.raises(ValueError, match="'fast' can't be simulated; use one of pipelined"):
        simulate("fast", [0], [cost], 1)
    with pytest.raises(ValueError, match="1 stage costs for 2 stages"):
        simulate("pipelined", [0, 1], [cost], 1)
    with pytest.raises(ValueError, match="micro_batches=0"):
        simulate("pipelined", [0], [cost], 0)


# ---- the engine does what was simulated ----


class RecordedRun(Run):
    """A run that records its timeline."""

    def make_engine(self, partition: Partition, settings: EngineSettings) -> Engine:
        """The engine, with a timeline."""
        self.timeline = Timeline(len(partition.plan.devices))
        return Engine(partition, self.optimizer, causal_loss, settings, self.timeline)


def order(timeline: Timeline) -> list[list[tuple[str, int | None, int]]]:
    """What each device did, in its order."""
    return [
        [(e.kind, e.stage, e.index) for e in timeline.events if e.device == device]
        for device in range(timeline.num_devices)
    ]


@pytest.mark.parametrize("schedule", ours())
@pytest.mark.parametrize(
    "case",
    [
        Case(stages=3, updates=(1,) * 8),
        Case(stages=4, updates=(3,) * 4, recompute=True),
        Case(stages=4, updates=(2,) * 4, tied=False),
        Case(stages=5, updates=(2,) * 5, devices=2),  # several stages on every device
    ],
    ids=["K=3 M=1", "K=4 M=3 recompute", "K=4 untied", "K=5 on 2 devices"],
)
def test_order_is_that_of_the_engine(case: Case, schedule: str) -> None:
    torch.set_num_threads(1)
    run = RecordedRun(case, schedule).train()
    plan = run.engine.partition.plan
    costs = [StageCost(1.0, 2.0, plan_cost=row.cost) for row in plan.rows]
    micro_batches, updates = case.updates[0], len(case.updates)
    programs = run_programs(schedule, plan.placement, costs, micro_batches, updates, recompute=case.recompute)
    simulated = as_timeline(execute(programs, plan.placement, costs, Links()), len(plan.devices))
    recorded = order(run.timeline)
    assert sum(map(len, recorded)) > 2 * sum(case.updates)
    # Ticks whose gradient no update has applied yet have no backward in either.
    assert recorded == order(simulated)
