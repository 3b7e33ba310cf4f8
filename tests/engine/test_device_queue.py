"""Queues of accelerators, with a double of the device's library: what is asked of which stream, and that nothing races."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import Case, Run, oracle
from stream_races import RacingBackend

from hf_ouroboros.engine import core, device_queue, parts
from hf_ouroboros.engine.device_queue import AHEAD, AcceleratorQueue, DeviceQueue, handed_over, queue_of
from hf_ouroboros.engine.state import RunState
from hf_ouroboros.schedules import SCHEDULES

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


class Racing(Run):
    """A run whose workers believe that they work on accelerators.

    Args:
        case: what to compute.
        schedule: how.
        devices: of the workers.
        patch: pytest's.
    """

    def __init__(self, case: Case, schedule: str, devices: list[torch.device], patch: pytest.MonkeyPatch):
        self.backend = RacingBackend()
        left = iter(devices)
        patch.setattr(parts, "queue_of", lambda device: AcceleratorQueue(next(left), self.backend))
        patch.setattr(core, "handed_over", self.handed_over)
        super().__init__(case, schedule)
        self.engine._parts.transport._queues = [worker._queue for worker in self.engine._workers]

    def handed_over(self, batch: dict, to_queues: bool) -> tuple:
        main = self.backend.default_stream(FIRST)
        return batch, {device: self.backend.event(main) for device in (FIRST, SECOND)}

    def train(self, *args, **kwargs) -> Run:
        with self.backend.using(self.backend.default_stream(FIRST)), self.backend.observing(FIRST):
            return super().train(*args, **kwargs)


CASES = {
    "plain": Case(tied=False, layers=4, dropout=0.1, updates=(2, 2, 1, 2)),
    "weights of now": Case(tied=False, layers=4, updates=(2, 1, 2), padded=True, dropout=0.1, weights="now"),
    "recomputed": Case(tied=False, layers=4, updates=(2, 2, 2), recompute=True, padded=True),
    "predicted": Case(tied=False, layers=4, compensation="weight_prediction", updates=(2,) * 3),
    "muon": Case(tied=False, layers=4, optimizer="muon", compensation="error_feedback", updates=(2,) * 3, clip=0.1),
    "scaled": Case(tied=False, layers=4, scale=2.0**18, updates=(2,) * 4, clip=0.5),
}


SHARED, TWO = [FIRST] * 3, [FIRST, SECOND, FIRST]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "schedule", "devices"),
    [
        *(
            ("plain", schedule, devices)
            for schedule in ("pipelined", "lockstep", "1f1b", "zero_bubble")
            for devices in (SHARED, TWO)
        ),
        *((name, "pipelined", TWO) for name in CASES if name != "plain"),
        ("recomputed", "1f1b", SHARED),
        ("muon", "lockstep", SHARED),
        ("scaled", "1f1b", SHARED),
    ],
)
def test_nothing_races(name: str, schedule: str, devices: list, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    expected = oracle(case, "reference 1f1b" if SCHEDULES[schedule].is_synchronous else "reference", {1: "state"})
    found = Racing(case, schedule, devices, monkeypatch)
    found.train({1: "state"})
    assert found.backend.races == []
    assert found.losses == expected.losses
    for key, value in expected.model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[key]), key


def test_a_resumed_replay_does_not_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """What weights="now" has read from a checkpoint, the main thread has brought to the devices."""
    case = CASES["weights of now"]
    begun = Run(case, "reference")
    begun.update(0)
    checkpoint = begun.checkpoint()
    found = Racing(case, "pipelined", SHARED, monkeypatch)
    load = found.engine.load_state_dict

    def observed(state: RunState) -> None:
        with found.backend.using(found.backend.default_stream(FIRST)), found.backend.observing(FIRST):
            load(state)

    found.engine.load_state_dict = observed
    found.resume(checkpoint)
    found.train(updates=(1, 2))
    assert found.backend.races == []
    expected = Run(case, "reference").train()
    assert found.losses == expected.losses[2:]
    for key, value in expected.model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[key]), key


def test_global_clipping_does_not_race(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tied=False, clip=0.1, scope="global", updates=(2, 2, 2))
    found = Racing(case, "1f1b", [FIRST, SECOND, FIRST], monkeypatch)
    assert found.train().losses == Run(case, "reference 1f1b").train().losses
    assert found.backend.races == []


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", ["wait", "record", "go_on"])
def test_the_double_finds_what_is_forgotten(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["plain"]
    if forgotten == "go_on":
        monkeypatch.setattr(AcceleratorQueue, "go_on", lambda self, tensors=(): None)
        monkeypatch.setattr(AcceleratorQueue, "accept", lambda self, batch, events: None)
    else:
        monkeypatch.setattr(RacingBackend, forgotten, lambda self, *args: None)
    found = Racing(case, "pipelined", [FIRST, SECOND, FIRST], monkeypatch)
    found.train({1: "state"})
    assert found.backend.races


def test_a_thread_is_not_far_ahead_of_its_device() -> None:
    waited = []
    backend = RacingBackend()
    queue = AcceleratorQueue(FIRST, backend)
    event = backend.event
    backend.event = lambda *args, **kwargs: _Counted(event(*args, **kwargs), waited)
    for _ in range(AHEAD + 2):
        queue.keep_pace()
    assert len(waited) == 2


class _Counted:
    def __init__(self, event: object, waited: list):
        self._event, self._waited = event, waited

    def synchronize(self) -> None:
        self._waited.append(self._event)


def test_a_number_is_read_when_it_is_there() -> None:
    backend = RacingBackend()
    queue = AcceleratorQueue(FIRST, backend)
    with backend.using(queue._compute), backend.observing(FIRST):
        reading = queue.reading(torch.tensor(2.5) + 0)
    assert not reading.is_there
    assert float(reading) == 2.5
    assert reading.is_there


def test_cpu_workers_have_nothing_to_order() -> None:
    queue = queue_of(torch.device("cpu"))
    tensors, loss = {"hidden": torch.ones(2)}, torch.tensor(1.0)
    assert type(queue) is DeviceQueue
    assert queue.receive(queue.send(tensors, queue)) is tensors
    assert queue.reading(loss) is loss
    batch = {"input_ids": torch.ones(1)}
    assert handed_over(batch, to_queues=False) == (batch, {})


def test_accelerators_without_streams_are_taken_as_one_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_queue.torch, "get_device_module", lambda kind: object())
    assert type(queue_of(torch.device("mps"), partial(pytest.fail, "no backend is needed"))) is DeviceQueue
