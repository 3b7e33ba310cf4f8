"""Killed at any file operation of saving, replacing and rotating: the resumed run equals the uninterrupted one.

OUROBOROS_EXHAUSTIVE=1 tries every operation; else every few are.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from trainer_helpers import run_python

EXHAUSTIVE = bool(os.environ.get("OUROBOROS_EXHAUSTIVE"))

SCRIPT = """
import os, shutil, signal, sys, traceback
from pathlib import Path
import torch, safetensors.torch
from trainer_helpers import differing, outcome, trained
from hf_ouroboros.checkpoint import lock, placing, run_state

work, way, kind, first, stride = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
folder = work / "run"
options = dict(save_strategy="steps", save_steps=1, max_steps=2, save_total_limit=1, logging_steps=100)
if kind == "best":
    # The better of the two is the first: the last checkpoint goes at the end.
    options |= dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="score")
    options |= dict(greater_is_better=True)
if way == "two renames":
    placing._exchange = lambda first, second: False
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
left = None

def score(prediction):
    return {"score": -float(abs(prediction.predictions).mean())}

def train(folder, resume=None):
    given = {"compute_metrics": score} if kind == "best" else None
    return trained(folder, given, resume=resume, **options)

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

assert forked(expect) == 0
before = work / "before"
if kind == "again":
    os.rename(folder, before)
else:
    shutil.rmtree(folder)
tried = 0
for nth in range(first, 10_000, stride):
    if kind == "again":
        shutil.copytree(before, folder)
    code = forked(killed, nth)
    if code == 0:
        break
    assert code == -signal.SIGKILL, (nth, code)
    assert forked(resume) == 0, f"after a kill at operation {nth}"
    shutil.rmtree(folder)
    tried += 1
print(tried, nth)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way", "first"),
    [("fresh", "exchange", 3), ("again", "exchange", 0), ("again", "two renames", 5), ("best", "exchange", 8)],
)
def test_killed_at_every_file_operation(tmp_path: Path, kind: str, way: str, first: int) -> None:
    """`again` saves the same steps a second time into the same folder; a limit of 1 has every save remove a checkpoint."""
    stride = 1 if EXHAUSTIVE else 13
    done = run_python(
        SCRIPT, tmp_path, way, kind, 0 if EXHAUSTIVE else first, stride, timeout=1500 if EXHAUSTIVE else 200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tried, operations = map(int, done.stdout.split()[-2:])
    print(f"{kind}, {way}: killed at {tried} of {operations} operations")
    assert operations > 40 and tried >= operations // stride - 1
