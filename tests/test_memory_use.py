"""The memory of a process, and of processes that hold a part of a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ouroboros import memory_use
from hf_ouroboros.memory_use import peak_memory

MIB = 2**20


def test_resident_and_peak_size() -> None:
    before = peak_memory()
    if before.resident is None:
        pytest.skip("the current size is known on Linux only")
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    during = peak_memory()
    assert during.resident - before.resident > 60 * MIB
    assert during.peak_resident > during.resident - MIB  # the kernel counts per core, in batches of pages
    del block
    after = peak_memory()
    assert after.resident < during.resident - 60 * MIB
    assert after.peak_resident > during.peak_resident - MIB


def test_without_proc_getrusage_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(memory_use, "STATUS", tmp_path / "absent")
    usage = type("Usage", (), {"ru_maxrss": 3000})
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory().peak_resident == 3000 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory().peak_resident == 3000
    assert peak_memory().resident is None


def test_without_resource_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_use, "STATUS", tmp_path / "absent")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory().peak_resident is None


def test_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_memory().peak_cuda is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 77)
    assert peak_memory().peak_cuda == 77


# ---- parts of a model ----

LAYERS = 8
# Makes a tiny model first, so that only what grows with the model is counted.
PART = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, GPT2Config
from hf_ouroboros.memory_use import peak_memory
from hf_ouroboros.partition.initialising import initialise_owned
from hf_ouroboros.partition.owned_weights import load_owned

torch.set_num_threads(1)
how, tiny, folder, *owned = sys.argv[1:]
make = {
    "load": lambda path: load_owned(path, lambda name: name.startswith(tuple(owned))),
    "initialise": lambda path: initialise_owned(
        GPT2Config.from_pretrained(path), lambda name: name.startswith(tuple(owned))
    ),
    "everything": lambda path: AutoModelForCausalLM.from_pretrained(path),
}[how]
make(tiny)
before = peak_memory()
model = make(folder)
values = [p for p in model.parameters() if not p.is_meta]
with torch.no_grad():
    [p.sum() for p in values]  # a mapped file is read when it is used
after = peak_memory()
growth = after.peak_resident - before.resident if before.resident else None
print(json.dumps({"growth": growth, "bytes": sum(p.nbytes for p in values)}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny model and one of 83 MiB, of as many layers."""
    folders = []
    for width, vocabulary in ((16, 64), (384, 20000)):
        sizes = dict(n_embd=width, vocab_size=vocabulary, n_layer=LAYERS, n_head=2, n_positions=64)
        folders.append(str(tmp_path_factory.mktemp("model")))
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folders[-1])
    return folders[0], folders[1]


def measure(how: str, checkpoints: tuple[str, str], *owned: str) -> dict[str, int]:
    command = [sys.executable, "-c", PART, how, *checkpoints, *owned]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    if found["growth"] is None:
        pytest.skip("the current size is known on Linux only")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["load", "initialise"])
@pytest.mark.parametrize(
    "owned",
    [("transformer.h.2.", "transformer.h.3."), ("transformer.w", "transformer.h.0.")],
    ids=["middle", "first"],
)
def test_a_part_needs_the_memory_of_its_parameters(
    how: str, owned: tuple[str, ...], checkpoints: tuple[str, str]
) -> None:
    found = measure(how, checkpoints, *owned)
    # 15 % and a constant: 2^20 elements to draw into, pages of libraries that are touched for the first time. The
    # embedding has 29 MiB, a layer 7.
    assert found["bytes"] < 40 * MIB
    assert found["bytes"] - MIB < found["growth"] < 1.15 * found["bytes"] + 8 * MIB


@pytest.mark.slow
def test_the_whole_would_not_pass(checkpoints: tuple[str, str]) -> None:
    found = measure("everything", checkpoints)
    assert found["growth"] > 80 * MIB
