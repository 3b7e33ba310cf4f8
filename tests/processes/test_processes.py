"""What a single process answers where trainer and hooks ask about processes; several of them are in every other test here."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from hf_ouroboros.processes.processes import Processes
from hf_ouroboros.simulate.timeline import Timeline


def test_a_single_process_knows_everything_already(tmp_path: Path) -> None:
    processes, value, timeline = Processes(), object(), Timeline(1, ["cpu"])
    assert processes.alone and processes.is_main and processes.own_device is None
    assert (processes.rank, processes.replica, processes.replicas, processes.processes_per_replica) == (0, 0, 1, 1)
    assert (processes.rng_file, processes.share_of_host, processes.rows_left) == ("rng_state.pth", (0, 1), None)
    assert processes.gather(value) == [value] and processes.sum(2.5) == 2.5
    for same in (processes.broadcast, processes.from_last_stage, processes.last_stage_to_main):
        assert same(value) is value
    assert processes.gather_timeline(timeline) is timeline
    processes.gather_files(tmp_path, ["no such file"])
    processes.barrier()


def test_a_single_process_agrees_with_itself_without_looking() -> None:
    """Digests of a model take time: they are made only where somebody compares them."""
    Processes().agree("a point", lambda: pytest.fail("nobody compares this"), timedelta(seconds=1))


def test_four_processes_of_two_replicas() -> None:
    processes = Processes(rank=3, world_size=4, replica=1, replicas=2, device_index=1)
    assert not processes.alone and not processes.is_main and processes.processes_per_replica == 2
