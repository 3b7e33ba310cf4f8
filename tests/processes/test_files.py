"""Checkpoints without a shared file system, and files that don't fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import Ended, ends_of, in_processes
from torch import nn
from trainer_helpers import differing, split_options
from trainer_runs import made, run_here
from transformers import AutoModelForCausalLM

import hf_ouroboros.processes.files
from hf_ouroboros import CheckpointError
from hf_ouroboros.checkpoint import load_run_state
from hf_ouroboros.checkpoint.weights import written_tensors

OPTIONS = {"num_stages": 3, "save_strategy": "steps", "save_steps": 2}


def on_its_own_disk(rank: int, folder: str) -> list[str]:
    """Every process works in a directory of its own, so that the same relative path is another place."""
    os.chdir(Path(folder) / str(rank))
    hf_ouroboros.processes.files.PIECE_BYTES = 10_000  # several pieces per file
    trainer = made(".", {"options": OPTIONS})
    trainer.train()
    trainer.save_model()
    return sorted(str(path) for path in Path("out").rglob("*"))


@pytest.mark.slow
def test_without_a_shared_file_system(tmp_path: Path) -> None:
    """The main process ends up with everything, the others with nothing; what it has resumes exactly."""
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    main, other = in_processes(2, on_its_own_disk, str(tmp_path))
    assert "out/checkpoint-2/optimizer-00002-of-00002.pt" in main and "out/model-00002-of-00002.safetensors" in main
    assert not [name for name in other if Path(name).suffix], other
    here = {"options": OPTIONS | split_options(3, 2)}
    expected = run_here(tmp_path, {**here, "name": "here"})
    saved = tmp_path / "0" / "out"
    load_run_state(saved / "checkpoint-2")
    found = run_here(tmp_path, {**here, "name": "on", "resume": str(saved / "checkpoint-2")})
    assert differing(expected["weights"], found["weights"]) == []
    assert differing(expected["optimizer"], found["optimizer"]) == []
    whole = dict(AutoModelForCausalLM.from_pretrained(saved).named_parameters())
    assert differing(expected["weights"], {n: whole[n].detach() for n in expected["weights"]}) == []


def resuming(rank: int, folder: str, checkpoint: str) -> None:
    made(folder, {"options": OPTIONS}).train(resume_from_checkpoint=checkpoint)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run over processes."""
    folder = tmp_path_factory.mktemp("saved")
    in_processes(2, on_shared_disk, str(folder))
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "damaged", ["model-00002-of-00002.safetensors", "optimizer-00001-of-00002.pt", "ouroboros_state.json"]
)
def test_a_damaged_checkpoint_names_the_one_before(tmp_path: Path, saved: Path, damaged: str) -> None:
    shutil.copytree(saved / "out", tmp_path / "out")
    truncate(tmp_path / "out" / "checkpoint-4" / damaged)
    ends = ends_of(2, resuming, str(tmp_path), str(tmp_path / "out" / "checkpoint-4"))
    assert all(isinstance(end, Ended) for end in ends)
    text = "\n".join(end.text for end in ends)
    assert "CheckpointError" in text and damaged in text
    assert f"The checkpoint before it is complete: resume_from_checkpoint='{tmp_path / 'out' / 'checkpoint-2'}'" in text
    with pytest.raises(CheckpointError, match="The checkpoint before it is complete"):
        resuming_here(tmp_path)


def on_shared_disk(rank: int, folder: str) -> None:
    made(folder, {"options": OPTIONS}).train()


def resuming_here(folder: Path) -> None:
    run: dict[str, Any] = {"options": OPTIONS | split_options(3, 2), "name": "here"}
    run_here(folder, {**run, "resume": str(folder / "out" / "checkpoint-4")})


@pytest.mark.slow
def test_damaged_for_one_process_only(tmp_path: Path, saved: Path) -> None:
    """A shard that holds nothing of the main process: both say the same."""
    shutil.copytree(saved / "out", tmp_path / "out")
    (tmp_path / "out" / "checkpoint-4" / "ouroboros_state-replica0-device1.safetensors").unlink()
    ends = ends_of(2, resuming, str(tmp_path), str(tmp_path / "out" / "checkpoint-4"))
    for end in ends:
        assert "ouroboros_state-replica0-device1.safetensors is missing" in end.text
        assert "The checkpoint before it is complete" in end.text


def test_a_buffer_is_written_where_its_module_is() -> None:
    """Also one beside the modules of the second and the third of three processes, of which the first one has nothing."""

    def held(part: int) -> nn.Module:
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Linear(2, 2, device="cpu" if k == part else "meta") for k in (0, 1, 2))
        model.layers[1].register_buffer("own", torch.zeros(2))
        model.pair = nn.Module()
        model.pair.layers = model.layers[1:]
        model.pair.register_buffer("shared", torch.zeros(2))
        return model

    written = [{name for name in written_tensors(held(part)) if name.endswith(("own", "shared"))} for part in range(3)]
    assert [name in found for found in written for name in ("layers.1.own", "pair.shared")] == [
        *(False, False),
        *(True, True),
        *(False, True),
    ]
