"""Old pickles: what is harmless is read, everything else is refused or inert, nothing is executed."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
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


# ---- pickles that would never end ----


def memo_of(index: int) -> bytes:
    return b"\x80\x02Nr" + index.to_bytes(4, "little") + b"."


def doubled(make: Any, times: int, leaf: Any = ()) -> Any:
    for _ in range(times):
        leaf = make((leaf, leaf))
    return leaf


def later() -> list:
    """Lists that were still empty when others referred to them."""
    lists: list[list] = [[] for _ in range(60)]
    for upper, lower in zip(lists, lists[1:], strict=False):
        upper += [lower, lower]
    return lists


class Call:
    """Pickles as a call."""

    def __init__(self, what: Any, *arguments: Any):
        self.call = what, arguments

    def __reduce__(self) -> tuple:
        return self.call


def instructions(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


ENDLESS: dict[str, bytes] = {
    "hash of nested tuples": instructions(b"}(", b")" + b"2\x86" * 60, b"Nu"),
    "a set of nested tuples": pickle.dumps(Call(set, [doubled(tuple, 60)])),
    "hash of a frozen set": pickle.dumps({doubled(frozenset, 3, ((1,), (2,))): doubled(tuple, 60)}),
    "depth": instructions(b")" + b"\x85" * 300_000),
    "text of nested lists": pickle.dumps(doubled(list, 60, [])),
    "text of nested dicts": pickle.dumps(doubled(lambda pair: {"a": pair[0], "b": pair[1]}, 60, {})),
    "lists that were empty": pickle.dumps(later()),
    "a list of itself": instructions(b"]q\x00h\x00a"),
    "long text, often": pickle.dumps(["x" * 1_000_000] * 1) [:-1] + b"".join([b"(" + b"h\x01" * 20_000 + b"l"] * 5) + b".",
    "keys of one hash": pickle.dumps({(2**61 - 1) * k: None for k in range(2_000, 6_000)}),
    "tuples of any hash": pickle.dumps([(k, k + 1) for k in range(20_001)]),
    "calls": instructions(b"ccollections\nCounter\nq\x00", b"(X\x00\x00\x10\x00" + b"x" * 2**20 + b"tq\x01",
                          b"h\x00h\x01R0" * 200_000, b"N"),
    "states": instructions(b"ccollections\nOrderedDict\n)Rq\x00", b"}(" + b"".join(b"K\x01I%d\n" % k for k in range(10_000))
                           + b"uq\x01", b"h\x01b" * 10_000),
    "memo": memo_of(2**32 - 1),
    "arguments": instructions(b"cbuiltins\nset\n(" + b"N" * 200 + b"tR"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ENDLESS)
def test_pickles_that_would_never_end(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(ENDLESS[kind])
    for stubs in (False, True):
        with pytest.raises(ConversionError, match="file: its? |file is damaged") as caught:
            load_pickle(path, stubs)
        assert len(str(caught.value)) < 600
    # The same inside of a torch file, of either kind.
    torch.save({"x": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "zip", "w") as other:
        for entry in archive.infolist():
            own = entry.filename.endswith("data.pkl")
            other.writestr(entry.filename, ENDLESS[kind] if own else archive.read(entry))
    legacy = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})) + ENDLESS[kind]
    (tmp_path / "legacy").write_bytes(legacy + pickle.dumps([], 2))
    for name in ("zip", "legacy"):
        for stubs in (False, True):
            with pytest.raises(ConversionError, match=f"{name}: its? |{name} is damaged"):
                load_pickle(tmp_path / name, stubs)


def test_archives_that_hold_more_than_their_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"N0" * 10**7 + b"N.")
    with pytest.raises(ConversionError, match="it is a compressed archive"):
        load_pickle(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(b"x" * 10_000, 4))
        archive.filelist *= 100  # the same bytes under many entries
    with pytest.raises(ConversionError, match="holds more than its size"):
        load_pickle(path)


def test_a_pickle_that_is_an_archive_too(tmp_path: Path) -> None:
    """What is looked at is what is read."""
    path = tmp_path / "file"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2))
    path.write_bytes(ENDLESS["hash of nested tuples"] + path.read_bytes())
    assert zipfile.is_zipfile(path)
    with pytest.raises(ConversionError, match="tuples|again and again"):
        load_pickle(path)


def test_large_vocabularies_are_far_from_all_bounds(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(10_000)]
    content = {
        "counter": collections.Counter(words),
        "idx2sym": words,
        "sym2idx": collections.OrderedDict((word, i) for i, word in enumerate(words)),
    }
    for how in ("pickle", "zip", "legacy"):
        assert load_pickle(write(content, tmp_path / how, how)) == content
