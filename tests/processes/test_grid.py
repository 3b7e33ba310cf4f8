"""Ranks, devices and replicas; channels and sums between processes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from rig import in_processes
from trainer_helpers import complete_optimizer
from trainer_runs import made

from hf_ouroboros.errors import UnsupportedOptionError
from hf_ouroboros.processes.channels import BoundarySpec, Channels, TensorSpec
from hf_ouroboros.processes.grid import ProcessGrid
from hf_ouroboros.processes.replica_mean import GroupMean
from hf_ouroboros.processes.reports import Reports, fingerprint

CPU = torch.device("cpu")


def grid_of(rank: int, world_size: int, replicas: int = 1) -> ProcessGrid:
    return ProcessGrid(rank, world_size, replicas, CPU, timedelta(seconds=30))


def test_rows_and_columns() -> None:
    grid = grid_of(4, 6, replicas=2)
    assert (grid.num_devices, grid.replica, grid.device_index) == (3, 1, 1)
    assert grid.row() == [3, 4, 5] and grid.row(0) == [0, 1, 2]
    assert grid.column() == [1, 4] and grid.column(2) == [2, 5]
    assert grid.rank_of(2) == 5 and grid.rank_of(2, 0) == 2


@pytest.mark.parametrize("replicas", [0, 4, 5])
def test_replicas_that_do_not_fit(replicas: int) -> None:
    with pytest.raises(
        UnsupportedOptionError, match=f"data_parallel_replicas={replicas} does not divide the 6 processes"
    ):
        grid_of(0, 6, replicas)


def pass_on(rank: int) -> list[Any]:
    """Stages 0 and 2 on device 0, stage 1 on device 1: hidden states up, gradients down, many of them posted first."""
    grid = grid_of(rank, 2)
    channels = Channels(grid, (0, 1, 0))
    shapes = [(1 + t % 3, 5) for t in range(20)]
    mine = [1] if rank else [2]
    posted = {
        (direction, stage): [channels.post(direction, stage, shape, torch.bfloat16) for shape in shapes]
        for direction in ("hidden", "gradient")
        for stage in ([1] if rank else [2] if direction == "hidden" else [0])
    }
    assert channels.peer("hidden", mine[0]) == 1 - rank and not channels.is_local("hidden", 1)
    for t, shape in enumerate(shapes):
        for direction, stage in [("hidden", 2), ("gradient", 0)] if rank else [("gradient", 1), ("hidden", 1)]:
            value = t + 100 * stage + 1000 * (direction == "gradient")
            channels.send(direction, stage, torch.full(shape, value, dtype=torch.float32).to(torch.bfloat16))
    found = {channel: [item.wait() for item in items] for channel, items in posted.items()}
    for (direction, stage), tensors in found.items():
        for t, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            value = torch.tensor(t + 100 * stage + 1000 * (direction == "gradient")).to(torch.bfloat16)
            assert tensor.shape == shape and bool((tensor == value).all()), (direction, stage, t)
    # Fresh memory for each: a receive never writes into what an earlier one gave out.
    pointers = [tensor.data_ptr() for tensors in found.values() for tensor in tensors]
    assert len(set(pointers)) == len(pointers)
    return [len(tensors) for tensors in found.values()]


@pytest.mark.slow
def test_channels() -> None:
    assert in_processes(2, pass_on) == [[20, 20], [20, 20]]


def average(rank: int) -> list[torch.Tensor]:
    mean = GroupMean(grid_of(rank, 3, 3).lease_group("column"))
    tensors = [torch.full((3, 2), float(rank)), torch.ones(()), torch.arange(4.0).to(torch.bfloat16) * rank]
    waits = [mean.start(tensors[:2]), mean.start(tensors[2:])]
    for wait in waits:
        wait()
    return tensors


def test_mean_over_replicas() -> None:
    for tensors in in_processes(3, average):
        assert torch.equal(tensors[0], torch.ones(3, 2))
        assert torch.equal(tensors[1], torch.ones(()))
        assert torch.equal(tensors[2], torch.arange(4.0).to(torch.bfloat16))


def report(rank: int, different: bool) -> Any:
    reports = Reports(grid_of(rank, 4, 2), (0, 1))
    batch = {"input_ids": torch.arange(6).view(2, 3) + (rank == 3 and different)}
    losses = [1.0 + rank, 3.0] if rank % 2 else []
    reports.send(1, 0, [4, 5], fingerprint(batch), losses, {rank % 2: 0.5 if rank % 2 else None}, stop=rank == 2)
    assert reports.take(issued_before=1) == []
    try:
        return reports.take()
    except Exception as error:
        return str(error)


def test_reports() -> None:
    """Losses are means over replicas, norms those of the first replica, and a wish to stop reaches everybody."""
    for (found,) in in_processes(4, report, False):
        assert (found.ticks, found.losses, found.norms, found.stop) == ([4, 5], [3.0, 3.0], [None, 0.5], True)


def test_processes_with_different_micro_batches() -> None:
    for text in in_processes(4, report, True):
        assert text.startswith("the processes of replica 1 got different micro-batches at ticks 4 to 5")


def test_shapes_of_a_boundary() -> None:
    hidden = TensorSpec((("batch",), ("time",), 8), torch.float32)
    rows = TensorSpec((("batch", "time"), 1), torch.int64, trained=False)
    spec = BoundarySpec({"hidden": hidden, "rows": rows})
    shapes = spec.shapes({"input_ids": torch.zeros(2, 3)})
    assert shapes == {"hidden": ((2, 3, 8), torch.float32), "rows": ((6, 1), torch.int64)}
    assert (spec.trained("hidden"), spec.trained("rows"), len(spec)) == (True, False, 2)


def memory(rank: int, folder: str) -> tuple[int, int, int, list[str]]:
    """Bytes of values and of optimizer state in this process, and what its device should have."""
    trainer = made(folder, {"options": {"num_stages": 4}})
    trainer.train()
    here = {n: p for n, p in trainer.model.named_parameters() if not p.is_meta}
    state = complete_optimizer(trainer).state
    moments = sum(v.nbytes for entry in state.values() for k, v in entry.items() if k != "step")
    share = trainer.stage_plan.bytes_on(f"cpu:{rank}")
    return sum(p.untyped_storage().nbytes() for p in here.values()), moments, share, sorted(here)


@pytest.mark.slow
def test_each_process_holds_its_share(tmp_path: Any) -> None:
    parts = in_processes(3, memory, str(tmp_path))
    for values, moments, share, _ in parts:
        assert values == share and moments == 2 * share  # AdamW: two moments
    names = [name for *_, part in parts for name in part]
    assert len(set(names)) == len(names)
