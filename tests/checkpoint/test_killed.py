"""Killed at any file operation of saving, replacing and rotating: the resumed run equals the uninterrupted one.

OUROBOROS_EXHAUSTIVE=1 tries every operation; else every few are, of two of the four ways to save unless HF_OUROBOROS_EVERY_CASE=1.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from trainer_helpers import EVERY, run_python

EXHAUSTIVE = bool(os.environ.get("OUROBOROS_EXHAUSTIVE"))

SCRIPT = """
import gc, os, shutil, signal, sys, traceback
from pathlib import Path
import torch, safetensors.torch
from trainer_helpers import differing, outcome, trained
from hf_ouroboros.checkpoint import lock, placing, run_state

work, stride, cases = Path(sys.argv[1]), int(sys.argv[2]), [argument.split(":") for argument in sys.argv[3:]]
folder, before, kind = work / "run", work / "before", None
COMMON = dict(save_strategy="steps", save_steps=1, max_steps=2, save_total_limit=1, logging_steps=100)
# The better of the two is the first: the last checkpoint goes at the end.
BEST = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="score")
BEST |= dict(greater_is_better=True)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
left = None

def score(prediction):
    return {"score": -float(abs(prediction.predictions).mean())}

def train(folder, resume=None):
    given = {"compute_metrics": score} if kind == "best" else None
    return trained(folder, given, resume=resume, **(COMMON | BEST if kind == "best" else COMMON))

def count():
    global left
    if left is None:
        return
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def hook(event, args):
    if event in ("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "shutil.rmtree", "os.truncate"):
        if str(folder) in str(args) or (isinstance(args[-1], int) and args[-1] not in (-1, 0o777)):
            count()
    elif event == "open" and str(folder) in str(args[0]) and args[2] & WRITING:
        count()

def counted(module, name):
    function = getattr(module, name)
    def call(*args, **kwargs):
        count()
        return function(*args, **kwargs)
    setattr(module, name, call)

for module, name in ((torch, "save"), (run_state, "save_file"), (os, "fsync"), (placing, "_exchange")):
    counted(module, name)
sys.addaudithook(hook)

def forked(function, *args):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*args)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def expect():
    torch.save(outcome(train(folder)), work / "expected.pt")

def killed(nth):
    global left
    left = nth
    train(folder)

def resume():
    there = list(folder.glob("checkpoint-*")) + list(folder.glob(".saving-*/*.old"))
    found = outcome(train(folder, True if there else None))
    differences = differing(torch.load(work / "expected.pt"), found)
    assert not differences, differences
    assert not [p for p in folder.iterdir() if p.name.startswith((".", "_"))], list(folder.iterdir())

gc.collect()
gc.freeze()  # accelerate collects after every `train()`, and a forked process that looks at objects copies their memory
exchange = placing._exchange
for kind, way, first in cases:
    placing._exchange = exchange if way == "exchange" else lambda first, second: False
    assert forked(expect) == 0
    shutil.rmtree(before, ignore_errors=True)
    os.rename(folder, before)
    tried = 0
    for nth in range(int(first), 10_000, stride):
        if kind == "again":
            shutil.copytree(before, folder)
        code = forked(killed, nth)
        if code == 0:
            break
        assert code == -signal.SIGKILL, (kind, way, nth, code)
        assert forked(resume) == 0, (kind, way, nth)
        shutil.rmtree(folder)
        tried += 1
    shutil.rmtree(folder, ignore_errors=True)
    print(kind, way, tried, nth, sep=":")
"""


# what is done, how the old and the new checkpoint of a step change places, the first operation to be killed at
CASES = ["fresh:exchange:30", "again:exchange:34", "again:two renames:36", "best:exchange:50"]


@pytest.mark.slow
def test_killed_at_every_file_operation(tmp_path: Path) -> None:
    """`again` saves the same steps a second time into the same folder; a limit of 1 has every save remove a checkpoint."""
    stride = 1 if EXHAUSTIVE else 61
    cases = [case.rsplit(":", 1)[0] + ":0" for case in CASES] if EXHAUSTIVE else CASES if EVERY else CASES[1:3]
    done = run_python(SCRIPT, tmp_path, stride, *cases, timeout=7200 if EXHAUSTIVE else 280)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    rows = [line.split(":") for line in done.stdout.splitlines() if line.count(":") == 3]
    assert len(rows) == len(cases)
    assert all(int(operations) > 40 and int(tried) >= 1 for *_, tried, operations in rows)
