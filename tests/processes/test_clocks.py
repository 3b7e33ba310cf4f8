"""Events of several hosts on one clock."""

from __future__ import annotations

from hf_ouroboros.processes.clocks import Recording, on_one_clock
from hf_ouroboros.simulate.timeline import Event


def at(start: float) -> Event:
    return Event(0, 0, "forward", 3, start, start + 1)


def test_hosts_are_moved_and_their_processes_kept_together() -> None:
    """Host b's clock is 1000 s ahead; its two processes left the barrier a little apart."""
    recordings = [
        Recording("a", 50.0, [at(10.0), at(12.0)]),
        Recording("a", 50.25, [at(11.0)]),
        Recording("b", 1050.0, [at(1011.0)]),
        Recording("b", 1050.5, [at(1013.0)]),
    ]
    starts = [[event.start for event in events] for events in on_one_clock(recordings)]
    assert starts == [[10.0, 12.0], [11.0], [11.0], [13.0]]
    assert on_one_clock(recordings)[2] == [at(11.0)]
