"""FSDP, simulated: closed formulas where either the link or the devices set the pace."""

from __future__ import annotations

import pytest

from hf_ouroboros.simulate.links import Links
from hf_ouroboros.simulate.sharded import ShardedUnit, simulate_sharded

ENDS, LAYER = 8.0, 4.0  # bytes


def units(
    layers: int, forward: float, backward: float, devices: int = 2, ends: float = ENDS, step: float = 0.0
) -> list[ShardedUnit]:
    """An embedding, layers, and a head that takes no time; embedding and head have half of `ends` bytes each."""

    def unit(forward: float, backward: float, size: float, is_layer: bool) -> ShardedUnit:
        return ShardedUnit([forward] * devices, [backward] * devices, [step] * devices, size, size, is_layer)

    end = unit(0.0, 0.0, ends / 2, False)
    return [end, *[unit(forward, backward, LAYER, True)] * layers, end]


@pytest.mark.parametrize(("devices", "micro_batches"), [(1, 3), (2, 2), (4, 8)])
def test_linear_without_time_on_links(devices: int, micro_batches: int) -> None:
    found = simulate_sharded(units(3, 1.0, 2.0, devices, step=0.5), micro_batches)
    assert found.speedup == pytest.approx(devices)
    assert found.busy_shares == pytest.approx([1.0] * devices)
    assert found.fill_seconds == pytest.approx(3.0)
    ticks = {event.index for event in found.timeline.events if event.kind == "forward"}
    assert ticks == set(range(micro_batches))


@pytest.mark.parametrize("share", [1, 2, 3])
def test_the_link_sets_the_pace(share: int) -> None:
    """Per micro-batch: the ends once, every layer twice; per update: the gradients of all."""
    found = simulate_sharded(units(5, 0.0, 0.0), 2 * share, links=Links(bandwidth=1.0, latency=0.25))
    ends, layer = ENDS / 2 + 0.25, LAYER / 2 + 0.25  # half of the bytes come from the other device
    update = share * (ends + 2 * 5 * layer) + ends + 5 * layer
    assert found.seconds_per_tick * 2 * share == pytest.approx(update)


def test_gathers_hide_behind_computing() -> None:
    """All but the first one of forwards and of backwards, and the last reduction: nothing is computed beside them."""
    found = simulate_sharded(units(2, 3.0, 6.0, ends=0.0), 2, links=Links(bandwidth=2.0))
    assert found.seconds_per_tick * 2 == pytest.approx(2 * 9.0 + 3 * 1.0)
    assert found.busy_shares == pytest.approx([18 / 21] * 2)


def test_one_layer_is_gathered_ahead_and_no_more() -> None:
    """Gathers take 4, forwards 3: from the second layer on, a forward waits for what began when the one before began."""
    found = simulate_sharded(units(4, 3.0, 100.0, ends=0.0), 2, links=Links(bandwidth=0.5))
    assert found.fill_seconds == pytest.approx(4 * 4.0 + 3.0)


def test_the_slowest_device_sets_the_pace() -> None:
    even, uneven = units(2, 1.0, 2.0), units(2, 1.0, 2.0)
    uneven = [
        ShardedUnit(
            [u.forward[0], 3 * u.forward[0]],
            u.backward,
            *(getattr(u, n) for n in ("step", "parameter_bytes", "gradient_bytes", "is_layer")),
        )
        for u in uneven
    ]
    fast, slow = (simulate_sharded(u, 2, links=Links(bandwidth=1e6)) for u in (even, uneven))
    assert slow.seconds_per_tick > 1.5 * fast.seconds_per_tick
    assert slow.busy_shares[0] < slow.busy_shares[1]


def test_hosts_and_replicas() -> None:
    hosts = Links(bandwidth=1e9, devices_per_host=2, host_bandwidth=1.0)
    inside, across = (simulate_sharded(units(2, 0.0, 0.0, d), 4, links=hosts).seconds_per_tick for d in (2, 4))
    assert inside < 1e-6 < 1.0 < across
    alone, averaged = (
        simulate_sharded(units(2, 0.0, 0.0), 2, links=Links(bandwidth=1.0), replicas=r).seconds_per_tick for r in (1, 2)
    )
    # Every device averages its half of all gradients with one other.
    assert (averaged - alone) * 2 == pytest.approx((ENDS + 2 * LAYER) / 2)


def test_wrong_input_is_named() -> None:
    with pytest.raises(
        ValueError, match="fsdp: 3 micro-batches can't be shared equally by 2 devices; use a multiple of 2"
    ):
        simulate_sharded(units(2, 1.0, 2.0), 3)
