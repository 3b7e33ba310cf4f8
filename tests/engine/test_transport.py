"""Tensors between threads: in order, the very same objects, and nobody left waiting when a run is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from hf_ouroboros.engine.transport import Aborted, InProcessTransport


class Caller(threading.Thread):
    """Runs a function in a thread and keeps its result or exception."""

    def __init__(self, function: Callable[[], object]):
        super().__init__(daemon=True)
        self.function = function
        self.result: object = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error

    def outcome(self) -> object:
        """The result, once it is there."""
        self.join(30)
        assert not self.is_alive(), "still waiting"
        if self.error is not None:
            raise self.error
        return self.result


def test_channels_are_apart_and_in_order() -> None:
    transport = InProcessTransport(3, 2)
    tensors = [torch.zeros(1) for _ in range(6)]
    for tick in range(2):
        transport.send("hidden", 1, tick, tensors[tick])
        transport.send("hidden", 2, tick, tensors[2 + tick])
        transport.send("gradient", 1, tick, tensors[4 + tick])
    for tick in range(2):
        assert transport.receive("gradient", 1, tick) is tensors[4 + tick]
        assert transport.receive("hidden", 2, tick) is tensors[2 + tick]
        assert transport.receive("hidden", 1, tick) is tensors[tick]


def test_no_gradient_travels_too() -> None:
    transport = InProcessTransport(2, 2)
    transport.send("gradient", 0, 4, None)
    assert transport.receive("gradient", 0, 4) is None


def test_wrong_tick_is_an_error() -> None:
    transport = InProcessTransport(2, 2)
    transport.send("hidden", 1, 3, torch.zeros(1))
    with pytest.raises(RuntimeError, match="stage 1 expected the hidden of tick 2 but got tick 3"):
        transport.receive("hidden", 1, 2)


def test_receive_waits() -> None:
    transport = InProcessTransport(2, 2)
    caller = Caller(lambda: transport.receive("hidden", 1, 0))
    tensor = torch.zeros(1)
    transport.send("hidden", 1, 0, tensor)
    assert caller.outcome() is tensor


def test_abort_wakes_everybody() -> None:
    transport = InProcessTransport(3, 5)
    callers = [
        Caller(lambda: transport.receive("hidden", 1, 0)),
        Caller(lambda: transport.receive("gradient", 0, 0)),
        Caller(transport.rendezvous),
        Caller(lambda: transport.share(0, {0: 1.0})),
    ]
    assert not transport.aborted.is_set()
    transport.abort()
    for caller in callers:
        with pytest.raises(Aborted):
            caller.outcome()
    assert transport.aborted.is_set()


def test_abort_lasts() -> None:
    transport = InProcessTransport(2, 2)
    transport.abort()
    transport.abort()
    for _ in range(3):
        with pytest.raises(Aborted):
            transport.receive("hidden", 1, 0)
        with pytest.raises(Aborted):
            transport.rendezvous()


def test_what_was_sent_before_an_abort_still_arrives() -> None:
    transport = InProcessTransport(2, 2)
    transport.send("hidden", 1, 0, None)
    transport.abort()
    assert transport.receive("hidden", 1, 0) is None
    with pytest.raises(Aborted):
        transport.receive("hidden", 1, 1)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_share_puts_all_contributions_together(devices: int) -> None:
    transport = InProcessTransport(2 * devices, devices)
    updates = 200

    def device(index: int) -> list[dict[int, int]]:
        mine = (index, index + devices)
        return [dict(transport.share(u, {stage: 100 * u + stage for stage in mine})) for u in range(updates)]

    callers = [Caller(lambda i=i: device(i)) for i in range(devices)]
    expected = [{stage: 100 * u + stage for stage in range(2 * devices)} for u in range(updates)]
    for caller in callers:
        assert caller.outcome() == expected
    assert len(transport._shared) <= 2  # nothing piles up
