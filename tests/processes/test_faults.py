"""A process that is killed, raises, or hangs ends all others with a named error, and costs nothing but time."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import Ended, ends_of, in_processes
from trainer_helpers import EVERY, AtStep, differing, split_options
from trainer_runs import accuracy, held, made, most_likely, run_here

import hf_ouroboros.checkpoint.run_state
import hf_ouroboros.hooks.checkpoints
import hf_ouroboros.processes.files
import hf_ouroboros.processes.relay
import hf_ouroboros.processes.watch
from hf_ouroboros.engine.stage_runner import StageRunner
from hf_ouroboros.engine.worker import Worker

OPTIONS: dict[str, Any] = {
    "num_stages": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "ddp_timeout": 60,
}
METRICS = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": most_likely}
RUN: dict[str, Any] = {"options": OPTIONS, "trainer": METRICS, "name": "out"}
HERE: dict[str, Any] = {**RUN, "options": OPTIONS | split_options(3, 2)}

# Where a process can be struck: (owner, function, how often it is called at most in a run).
PLACES: dict[str, tuple[Any, str, int]] = {
    "instruction": (Worker, "_execute", 50),
    "backward": (StageRunner, "backward", 10),
    "evaluation": (hf_ouroboros.processes.relay.Relay, "_stage", 8),
    "weights": (hf_ouroboros.processes.files, "save_torch_state_dict", 5),
    "optimizer": (torch, "save", 10),
    "state": (hf_ouroboros.checkpoint.run_state, "save_file", 5),
    "collection": (hf_ouroboros.processes.files, "gather_objects", 12),
    "rename": (os, "rename", 8),
}


def strike(place: str, nth: int, action: Any) -> None:
    """Has `action` happen in the nth call of a place, in this process."""
    owner, name, _ = PLACES[place]
    original, calls = getattr(owner, name), [0]

    @functools.wraps(original)
    def struck(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, struck)


def fail() -> None:
    raise ValueError("struck")


ACTIONS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raises": fail,
    "hangs": lambda: time.sleep(3600),
}


def doomed(rank: int, folder: str, run: dict[str, Any], victim: int, place: str, nth: int, action: str) -> Any:
    """A run in which one process is struck."""
    if action != "raises":  # a main thread that is stuck in a library will not get out of it
        hf_ouroboros.processes.watch.GRACE = 3.0
    if rank == victim:
        strike(place, nth, ACTIONS[action])
    trainer = made(folder, run)
    trainer.train()
    return held(trainer)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_here(tmp_path_factory.mktemp("undisturbed"), HERE)


def assert_resumes(folder: Path, undisturbed: dict[str, Any]) -> None:
    """The newest checkpoint, if there is one, leads to the end of the undisturbed run."""
    saved = sorted((folder / "out").glob("checkpoint-*"))
    resume = str(max(saved, key=lambda path: int(path.name.split("-")[1]))) if saved else None
    found = run_here(folder, {**HERE, "resume": resume})
    for key in ("weights", "optimizer", "scheduler", "step"):
        assert differing(undisturbed[key], found[key]) == [], key


def kill_points(count: int) -> list[tuple[int, str, int]]:
    draw = random.Random(7)
    places = [*PLACES] * count
    return [(draw.randrange(2), place, draw.randint(1, PLACES[place][2])) for place in places[:count]]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "place", "nth"), kill_points(16 if EVERY else 8))
def test_killed(tmp_path: Path, undisturbed: dict[str, Any], victim: int, place: str, nth: int) -> None:
    ends = ends_of(2, doomed, str(tmp_path), RUN, victim, place, nth, "killed")
    if isinstance(ends[victim], Ended):
        assert ends[victim].how == "died"
        survivor = ends[1 - victim]
        assert isinstance(survivor, Ended), "the other process went on alone"
        # In its traceback, or, if its main thread was stuck in a library, as its last words.
        assert f": rank {victim} (replica 0, device {victim}) is gone" in survivor.text, survivor.text
    else:  # the place is reached less often in this process
        assert all(differing(undisturbed["weights"][n], w) == [] for e in ends for n, w in e["weights"].items())
    assert_resumes(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_raises(tmp_path: Path, victim: int) -> None:
    """The others name the process, what it did and its error."""
    run = {**RUN, "options": {"num_stages": 3}}
    ends = ends_of(2, doomed, str(tmp_path), run, victim, "backward", 5, "raises")
    assert all(isinstance(end, Ended) and end.how == "raised" for end in ends), ends
    assert f"WorkerError: worker on cpu:{victim} failed during Backward" in ends[victim].text
    other = ends[1 - victim].text
    assert f"RankFailedError: rank {victim} (replica 0, device {victim}) WorkerError: worker on cpu:{victim}" in other
    assert "ValueError: struck" in other and "tick=" in other


def raising_callback(rank: int, folder: str) -> None:
    trainer = made(folder, RUN)
    if rank == 1:
        trainer.add_callback(AtStep(2, fail))
    trainer.train()


@pytest.mark.slow
def test_main_thread_raises(tmp_path: Path) -> None:
    ends = ends_of(2, raising_callback, str(tmp_path))
    assert ends[1].text.rstrip().endswith("ValueError: struck")
    assert "RankFailedError: rank 1 (replica 0, device 1) ValueError: struck" in ends[0].text


@pytest.mark.slow
@pytest.mark.parametrize("action", ["hangs", "stopped"])
def test_hangs(tmp_path: Path, action: str) -> None:
    """Found out within ddp_timeout, and named, though the hanging process says nothing."""
    run = {**RUN, "options": {"ddp_timeout": 5, "num_stages": 4}}
    never = 1 if action == "stopped" else None
    ends = ends_of(3, doomed, str(tmp_path), run, 1, "backward", 4, action, never=never)
    for rank in {0, 1, 2} - {never}:
        assert ": rank 1 (replica 0, device 1)" in ends[rank].text, ends[rank].text
        assert action == "stopped" or "Backward(stage=1, tick=" in ends[rank].text


PREEMPTED = {"num_stages": 3, "enable_jit_checkpoint": True, "num_train_epochs": 6}


def preempted(rank: int, folder: str, run: dict[str, Any]) -> dict[str, Any]:
    """A run in which the second process gets a SIGTERM after two updates."""
    trainer = made(folder, run)
    if rank == 1:
        trainer.add_callback(AtStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    return held(trainer)


@pytest.mark.slow
def test_sigterm_saves_first(tmp_path: Path) -> None:
    """Whoever gets the signal, all processes save and stop at the same step; the checkpoint leads to the same end."""
    run = {"options": PREEMPTED, "name": "out"}
    ends = in_processes(2, preempted, str(tmp_path), run)
    stopped = ends[0]["step"]
    assert 2 < stopped == ends[1]["step"] < 18
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{stopped}"]
    here = {"options": PREEMPTED | split_options(3, 2)}
    expected = run_here(tmp_path, {**here, "name": "whole"})
    found = run_here(tmp_path, {**here, "name": "on", "resume": str(tmp_path / "out" / f"checkpoint-{stopped}")})
    assert differing(expected["weights"], found["weights"]) == []


def test_sigterm_in_one_process(tmp_path: Path) -> None:
    trainer = made(str(tmp_path), {"options": PREEMPTED | split_options(3, 2), "name": "out"})
    before = signal.getsignal(signal.SIGTERM)
    trainer.add_callback(AtStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert trainer.state.global_step == 2 or trainer.state.global_step == 3
    assert (tmp_path / "out" / f"checkpoint-{trainer.state.global_step}").is_dir()
    assert signal.getsignal(signal.SIGTERM) is before
