"""A process that refuses, ends, is killed, or goes elsewhere is named by all others, at once."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rig import Ended, ends_of, forked, in_processes
from trainer_helpers import common_options, ouroboros

from hf_ouroboros import DisagreementError, OuroborosArguments, RankFailedError, UnsupportedOptionError
from hf_ouroboros.processes.meeting import Meeting, present, refusing

SOON = timedelta(seconds=30)
WITHIN = 30.0  # seconds, half of ddp_timeout: nobody waited for that. Measured on a quiet machine: about one


def counting(rank: int) -> list[Any]:
    meeting, found = present(), []
    for value in (0, rank, 0, rank, 0):
        try:
            meeting.agree("here", {"numbers": {"value": value}}, SOON)
            found.append("agreed")
        except DisagreementError as error:
            found.append(error.everywhere and str(error))
    assert meeting is present()
    return [found, sorted(k for n in range(5) for k in _keys(meeting, n))]


def _keys(meeting: Meeting, number: int) -> list[str]:
    return [
        f"{kind} {number}" for kind in ("sums", "facts") if meeting._store.check([f"{kind} {number} {meeting._rank}"])
    ]


def test_goes_on_after_a_difference_and_leaves_no_keys_behind() -> None:
    for found, keys in in_processes(3, counting):
        assert [entry[:40] for entry in found] == ["agreed", "the processes of this run disagree, at h"] * 2 + [
            "agreed"
        ]
        assert "value is 0 on rank 0, 1 on rank 1, 2 on rank 2" in found[1]
        assert keys == ["sums 4"]


def refused(rank: int, odd: int) -> tuple[str, float]:
    start = time.monotonic()
    with pytest.raises((UnsupportedOptionError, RankFailedError)) as caught, refusing():
        if rank == odd:
            with refusing():  # an inner one does not count twice
                raise UnsupportedOptionError("no such thing")
        present().agree("the start", {}, SOON)
    present().agree("the next try", {}, SOON)
    return f"{caught.typename}: {caught.value}", time.monotonic() - start


@pytest.mark.parametrize("odd", [0, 2])
def test_a_refusal_is_named_by_all_others(odd: int) -> None:
    for rank, (text, seconds) in enumerate(in_processes(3, refused, odd)):
        other = f"RankFailedError: rank {odd} refused before the start: UnsupportedOptionError: no such thing"
        assert text == ("UnsupportedOptionError: no such thing" if rank == odd else other)
        assert seconds < WITHIN


def late(rank: int) -> None:
    if rank == 1:
        present().agree("the start", {}, timedelta(seconds=0.5))
    else:
        time.sleep(1.5)


@pytest.mark.slow
def test_a_process_that_does_not_come(tmp_path: Path) -> None:
    ends = ends_of(2, late)
    assert isinstance(ends[1], Ended)
    assert "RankFailedError: rank 0 did not come to the start within 0 s (ddp_timeout)" in ends[1].text


def elsewhere(rank: int, folder: str) -> str:
    trainer = ouroboros(folder)
    with pytest.raises(DisagreementError) as caught:
        trainer.save_model() if rank else trainer.evaluate()
    return str(caught.value)


def test_processes_that_make_different_calls(tmp_path: Path) -> None:
    for text in in_processes(2, elsewhere, str(tmp_path)):
        assert 'the point they have reached is "an evaluation" on rank 0, "save_model()" on rank 1' in text


def test_a_single_process_meets_nobody() -> None:
    assert not dist.is_initialized() and present() is None
    with pytest.raises(KeyError), refusing():
        raise KeyError("x")


# ---- whole scripts, started without a launcher that would end the others ----


def script(what: str, folder: str, odd: bool) -> None:
    """What a script does until it ends, well or badly."""
    options: dict[str, Any] = {"ddp_timeout": 60}
    if what == "before they meet" and odd:
        options["warmup_steps"] = -3
    if what == "arguments" and odd:
        options["schedule"] = "zigzag"
    if what in ("script", "killed"):
        OuroborosArguments(**common_options(folder, **options))
        if what == "script" and odd:
            raise FileNotFoundError("data.txt")
        if odd:
            os.kill(os.getpid(), signal.SIGKILL)
    trainer = ouroboros(folder, **options)
    if what == "one saves" and odd:
        trainer.save_model()


def as_a_program(rank: int, port: int, out: str, *args: Any) -> None:
    """Runs a script as Python runs a program, up to its exit handlers."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    start = time.monotonic()
    sys.stderr = open(os.devnull, "w")
    try:
        script(*args)
    except BaseException as error:
        Path(out).write_text(f"{time.monotonic() - start} {type(error).__name__}: {error}")
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    os._exit(0)


# what happens -> (words of the odd process, words of the other one)
SCRIPTS = {
    "before they meet": ("ValueError: Got warmup_steps = -3", "RankFailedError: rank {odd} refused before"),
    "arguments": ("UnsupportedOptionError: schedule='zigzag'", "RankFailedError: rank {odd} refused before"),
    "script": (
        "FileNotFoundError: data.txt",
        "RankFailedError: rank {odd} ended with FileNotFoundError: data.txt, while",
    ),
    "killed": ("", "RankFailedError: rank {odd} "),
    "one saves": ("RankFailedError: rank {other} ended, while others waited for it at save_model()", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("what", SCRIPTS)
def test_scripts(tmp_path: Path, what: str, odd: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outs = [tmp_path / f"out-{rank}" for rank in range(2)]
    arguments = [(rank, port, str(outs[rank]), what, str(tmp_path), rank == odd) for rank in range(2)]
    processes = [forked(as_a_program, *args) for args in arguments]
    try:
        for each in processes:
            each.start()
        for each in processes:
            each.join(60)
            assert each.exitcode is not None, what
    finally:
        for each in processes:
            each.kill()
    for rank, out in enumerate(outs):
        seconds, _, text = (out.read_text() if out.exists() else "0 ").partition(" ")
        expected = SCRIPTS[what][rank != odd].format(odd=odd, other=1 - odd)
        assert text.startswith(expected) and bool(text) == bool(expected), (what, text)
        assert float(seconds) < WITHIN, (what, seconds)
