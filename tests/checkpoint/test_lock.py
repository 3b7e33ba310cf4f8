"""One run at a time saves in a folder: others are refused by name, the dead don't hold it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rig import Ended, context, ends_of, forked, in_processes
from trainer_helpers import AtStep, assert_same, ouroboros, trained
from trainer_runs import made

from hf_ouroboros import OutputFolderError
from hf_ouroboros.checkpoint import load_run_state, lock
from hf_ouroboros.checkpoint.lock import LOCK_FILE, FolderLock, Holder

SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(lock, "BEAT", 0.1)
    yield
    assert "ouroboros lock" not in [thread.name for thread in threading.enumerate()]


def write(folder: Path, holder: Holder) -> None:
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_comes_and_goes(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with FolderLock(folder) as held:
        held.check()
        found = json.loads((folder / LOCK_FILE).read_text())
        assert found["pid"] == os.getpid() and found["host"] and found["since"]
    assert list(folder.iterdir()) == []


def test_a_second_one_is_refused(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        with pytest.raises(
            OutputFolderError, match=rf"output_dir='{tmp_path}' is in use: this process on .* saves there"
        ):
            FolderLock(tmp_path).__enter__()
        assert (tmp_path / LOCK_FILE).exists()
    with FolderLock(tmp_path):
        pass


def test_a_living_process_is_refused_at_once(tmp_path: Path) -> None:
    write(tmp_path, replace(Holder.here(), pid=os.getppid(), started=lock._started(os.getppid())))
    with pytest.raises(OutputFolderError, match=rf"process {os.getppid()} on .*remove .*{LOCK_FILE}"):
        FolderLock(tmp_path).__enter__()


@pytest.mark.parametrize("kind", ["dead", "another that got its number", "half-made", "nonsense"])
def test_the_dead_are_taken_over(tmp_path: Path, kind: str) -> None:
    me = Holder.here()
    if kind == "nonsense":
        write(tmp_path, replace(me, pid="all of them"))
    elif kind == "half-made":
        (tmp_path / LOCK_FILE).write_text("")
        (tmp_path / f"{LOCK_FILE}.left").write_text("")
    else:
        write(tmp_path, replace(me, pid=dead_pid()) if kind == "dead" else replace(me, started=1))
    with FolderLock(tmp_path) as held:
        held.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"place": "another container"}])
def test_elsewhere_signs_of_life_count(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    """A process number of another host or container says nothing."""
    write(tmp_path, replace(Holder.here(), pid=dead_pid(), **elsewhere))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(tmp_path / LOCK_FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(OutputFolderError, match="in use"):
            FolderLock(tmp_path).__enter__()
    finally:
        stop.set()
        thread.join()
    with FolderLock(tmp_path) as held:  # now it is silent
        held.check()


def test_who_was_taken_over_saves_no_more(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as held:
        write(tmp_path, replace(Holder.here(), host="elsewhere"))
        with pytest.raises(OutputFolderError, match="taken over by process .* on elsewhere"):
            held.check()
    assert (tmp_path / LOCK_FILE).exists(), "it is not this one's to remove"


def test_removed_by_hand(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as held:
        (tmp_path / LOCK_FILE).unlink()
        held.check()
        assert (tmp_path / LOCK_FILE).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="can't be written.*another output_dir"):
        FolderLock(tmp_path / "file").__enter__()


def hold(folder: str, barrier: Any, said: Any) -> None:
    """Takes a folder for a moment, or says that it could not."""
    barrier.wait()
    try:
        with FolderLock(folder):
            said.put("held")
            barrier.wait()
    except OutputFolderError as error:
        said.put("refused" if "in use" in str(error) else str(error))
        barrier.wait()


@pytest.mark.slow
def test_several_at_once(tmp_path: Path) -> None:
    """Of processes that find the same dead holder, one gets the folder."""
    write(tmp_path, replace(Holder.here(), pid=dead_pid()))
    assert sorted(said_by(4, hold, str(tmp_path))) == ["held", "refused", "refused", "refused"]
    assert list(tmp_path.iterdir()) == []


def said_by(count: int, target: Any, folder: str) -> list[str]:
    """What processes say that begin together."""
    barrier, said = context.Barrier(count), context.Queue()
    processes = [forked(target, folder, barrier, said) for _ in range(count)]
    for process in processes:
        process.start()
    found = [said.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(timeout=30)
    return found


# ---- runs ----


@pytest.mark.slow
def test_a_second_run_in_the_same_folder(tmp_path: Path) -> None:
    """Refused before it does anything; the first one is not disturbed."""
    refusals: list[str] = []

    def second() -> None:
        other = ouroboros(tmp_path, **SAVING)
        before = {name: value.clone() for name, value in other.model.state_dict().items()}
        with pytest.raises(OutputFolderError, match="in use") as caught:
            other.train()
        assert_same(before, dict(other.model.state_dict()))
        refusals.append(str(caught.value))

    first = ouroboros(tmp_path, **SAVING)
    first.add_callback(AtStep(None, second))
    first.train()
    assert len(refusals) == 6
    assert [load_run_state(tmp_path / f"checkpoint-{step}").update for step in range(1, 7)] == list(range(1, 7))
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("checkpoint-")]
    assert_same(first, trained(tmp_path / "alone"))


@pytest.mark.slow
def test_runs_that_don_t_save_share_a_folder(tmp_path: Path) -> None:
    first = ouroboros(tmp_path, **SAVING, max_steps=1)
    first.add_callback(AtStep(1, lambda: trained(tmp_path, max_steps=1)))
    first.train()
    assert_same(first, trained(tmp_path, max_steps=1))


def test_taken_over_while_it_trains(tmp_path: Path) -> None:
    """As after a night in which the host slept: what the other one saves is left alone."""
    trainer = ouroboros(tmp_path, **SAVING)
    trainer.add_callback(AtStep(3, lambda: write(tmp_path, replace(Holder.here(), host="elsewhere"))))
    with pytest.raises(OutputFolderError, match="taken over"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def train_beside(folder: str, barrier: Any, said: Any) -> None:
    barrier.wait()
    try:
        trained(folder, **SAVING)
        said.put("ended")
    except OutputFolderError as error:
        said.put("refused" if "in use" in str(error) else str(error))


@pytest.mark.slow
def test_two_runs_at_once(tmp_path: Path) -> None:
    """Started together, by hand or by two schedulers: one ends well, no checkpoint is damaged."""
    said = said_by(2, train_beside, str(tmp_path))
    assert "ended" in said and set(said) <= {"ended", "refused"}
    for path in tmp_path.glob("checkpoint-*"):
        load_run_state(path)
    assert len(list(tmp_path.iterdir())) == 6


def killed(rank: int, folder: str) -> None:
    trainer = made(folder, {"options": SAVING | {"num_stages": 3}})
    trainer.add_callback(AtStep(3, lambda: os._exit(9)))
    trainer.train()


def resumed(rank: int, folder: str) -> tuple[int, bool]:
    trainer = made(folder, {"options": SAVING | {"num_stages": 3}})
    trainer.train(resume_from_checkpoint=True)
    return trainer.state.global_step, (Path(folder) / "out" / LOCK_FILE).exists()


def second_run(rank: int, folder: str) -> str:
    trainer = made(folder, {"options": SAVING | {"num_stages": 3}})
    with pytest.raises(OutputFolderError) as caught:
        trainer.train()
    return str(caught.value)


@pytest.mark.slow
def test_a_run_of_several_processes_is_one_run(tmp_path: Path) -> None:
    """It holds the folder once, all are refused alike, and its dead don't hold it."""
    ends = ends_of(2, killed, str(tmp_path))
    assert all(isinstance(end, Ended) for end in ends)
    assert (tmp_path / "out" / LOCK_FILE).exists()
    assert in_processes(2, resumed, str(tmp_path)) == [(6, False)] * 2
    with FolderLock(tmp_path / "out"):
        texts = in_processes(2, second_run, str(tmp_path))
    assert texts[0] == texts[1] and f"process {os.getpid()} on" in texts[0]
