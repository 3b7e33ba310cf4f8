"""Links: what a message takes within a host and between hosts."""

from __future__ import annotations

import pytest

from hf_ouroboros.simulate.links import Links


def test_one_host() -> None:
    assert Links().message(0, 1, 1e9) == (0.0, 0.0)
    assert Links(bandwidth=1e9, latency=0.5).message(3, 2, 2e9) == (2.0, 0.5)


def test_several_hosts() -> None:
    links = Links(bandwidth=1e9, latency=0.5, devices_per_host=2, host_bandwidth=1e8, host_latency=3.0)
    assert links.message(0, 1, 1e9) == (1.0, 0.5)
    assert links.message(1, 2, 1e9) == (10.0, 3.0)
    assert links.message(3, 0, 1e9) == (10.0, 3.0)
    assert Links(bandwidth=1e9, latency=0.5, devices_per_host=2).message(1, 2, 1e9) == (1.0, 0.5)


def test_ring() -> None:
    links = Links(bandwidth=1e9, latency=0.5)
    assert links.ring(1, 1e9) == links.ring(4, 0.0) == 0.0
    assert links.ring(4, 1e9) == pytest.approx(3 * (0.25 + 0.5))
    hosts = Links(bandwidth=1e9, devices_per_host=2, host_bandwidth=1e8, host_latency=1.0)
    assert hosts.ring(2, 1e9) == pytest.approx(0.5)
    assert hosts.ring(4, 1e9) == pytest.approx(3 * (2.5 + 1.0))


def test_mean_over_replicas() -> None:
    assert Links(bandwidth=1e9).mean_over(1, 1e9) == 0.0
    assert Links(bandwidth=1e9, latency=0.5).mean_over(4, 1e9) == pytest.approx(2 * 3 * (0.25 + 0.5))
    assert Links(bandwidth=1e9, host_bandwidth=1e8).mean_over(2, 1e9) == pytest.approx(10.0)


@pytest.mark.parametrize("wrong", [{"bandwidth": 0}, {"latency": -1}, {"host_bandwidth": -1}, {"devices_per_host": 0}])
def test_wrong_input_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Links(**wrong)
