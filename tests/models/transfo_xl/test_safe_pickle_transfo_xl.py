"""Old pickles: what is harmless is read, everything else is refused or inert, nothing is executed."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ouroboros.models.transfo_xl.errors import ConversionError
from hf_ouroboros.models.transfo_xl.safe_pickle import Stub, load_pickle

PLAIN = {
    "counter": collections.Counter("abba"),
    "ids": collections.OrderedDict(a=0),
    "set": {1},
    "list": [1, "x", None],
}


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, victim: Path, call: Any = os.mkdir):
        self._reduced = (call, (str(victim),))

    def __reduce__(self) -> tuple:
        return self._reduced


def write(content: Any, path: Path, how: str) -> Path:
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    return path


formats = pytest.mark.parametrize("how", ("pickle", "zip", "legacy"))


@formats
@pytest.mark.parametrize("stubs", (False, True))
def test_plain_data(how: str, stubs: bool, tmp_path: Path) -> None:
    assert load_pickle(write(PLAIN, tmp_path / "file", how), stubs) == PLAIN


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(pickle.dumps(PLAIN, protocol))
    if protocol < 2:
        # Sets need a function that builds any object then.
        assert load_pickle(tmp_path / "file", allow_stubs=True)["ids"] == PLAIN["ids"]
    else:
        assert load_pickle(tmp_path / "file") == PLAIN


@formats
def test_tensors(how: str, tmp_path: Path) -> None:
    if how == "pickle":
        pytest.skip("tensors are saved with torch.save")
    content = {"weight": torch.nn.Parameter(torch.arange(6.0).view(2, 3)), "size": torch.Size([2])}
    for stubs in (False, True):
        found = load_pickle(write(content, tmp_path / "file", how), stubs)
        assert torch.equal(found["weight"], content["weight"]) and found["size"] == content["size"]


@formats
@pytest.mark.parametrize("call", (os.mkdir, os.system, eval))
def test_a_hostile_pickle_is_refused_and_never_executed(how: str, call: Any, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    argument = {os.mkdir: victim, os.system: f"touch {victim}", eval: f"open({str(victim)!r}, 'w')"}[call]
    path = write({"idx2sym": [Hostile(argument, call)]}, tmp_path / "file", how)
    with pytest.raises(ConversionError, match="allow_stubs=True"):
        load_pickle(path)
    content = load_pickle(path, allow_stubs=True)
    assert isinstance(content["idx2sym"][0], Stub) and "stub of" in repr(content["idx2sym"][0])
    assert not victim.exists()
    # The pickle is real: without our unpickler it does its work.
    pickle.loads(pickle.dumps(Hostile(argument, call)))
    assert victim.exists()


def test_what_is_found_can_not_be_changed(tmp_path: Path) -> None:
    """A pickle may set attributes of the objects it finds: BUILD with a pair of states does so by setattr."""
    path = tmp_path / "file"
    path.write_bytes(b"ccollections\nCounter\n(N}S'update'\nS'gone'\nstb.")
    load_pickle(path)
    assert callable(collections.Counter.update)


def test_damaged_files_and_archives_of_code(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"no pickle")
    with pytest.raises(ConversionError, match="file is damaged"):
        load_pickle(path)
    path.write_bytes(pickle.dumps(PLAIN)[:-20])
    with pytest.raises(ConversionError, match="file is damaged"):
        load_pickle(path)
    with pytest.raises(FileNotFoundError):
        load_pickle(tmp_path / "nothing")
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    with pytest.raises(ConversionError, match="TorchScript"):
        load_pickle(path, allow_stubs=True)
    with pytest.raises(ConversionError):
        load_pickle(path)
