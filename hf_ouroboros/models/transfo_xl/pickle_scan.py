"""Bounds on the work of reading a pickle, found by going through its instructions without executing any.

A pickle that imports nothing can still never end: a few dozen bytes make tuples of tuples whose hash, or lists of lists whose
text in an error message, has 2**60 parts; keys that all have the same hash; one large argument copied a million times; a memo
with room for 2**32 objects; an archive that is a thousand times as large once it is unpacked. What vocabularies and
checkpoints need is far from all of these bounds.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from .errors import ConversionError

MOST_TUPLES = 20_000  # also of one hash: comparing each with each is a matter of seconds
MOST_ARGUMENTS = 100  # of a call
MOST_DEPTH = 200  # of tuples in tuples
MOST_LARGE_INTEGERS = 1_000  # those beyond 61 bits, which may have the hash of others
PARTS = 1_000_000  # that any file may have; further ones by its instructions
PARTS_PER_INSTRUCTION = 50
_LARGE = 2**61 - 1

_GET = {"GET", "BINGET", "LONG_BINGET"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_ADDS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"}
_FIXED = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
_LONGS = {"INT", "LONG", "LONG1", "LONG4"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"}
_CONTAINERS = (pickletools.pylist, pickletools.pydict, pickletools.pyset)


class _Thing:
    """An object as far as it matters here.

    Attributes:
        size: parts of it, each counted as often as it is referred to, when it was made; of a text, eighths of its letters.
        depth: of tuples in it.
        parts: what it refers to; None where it can't.
        weight: sizes of its parts together.
        fixed: whether it is a tuple.
    """

    __slots__ = ("depth", "fixed", "parts", "size", "weight")

    def __init__(self, size: int = 1, parts: list[_Thing] | None = None, fixed: bool = False):
        self.size, self.depth, self.parts, self.weight, self.fixed = size, 0, parts, 0, fixed
        if parts:
            self.weight = sum(part.size for part in parts)
        if fixed:
            self.size += self.weight
            self.depth = 1 + max((part.depth for part in self.held), default=0)

    @property
    def held(self) -> list[_Thing]:
        """Its parts; none where it can't refer to anything."""
        return self.parts or []

    def work(self) -> int:
        """How much somebody may have to look through who is given it: what it holds, and what that holds."""
        if not self.fixed:
            return self.size + self.weight
        if len(self.held) > MOST_ARGUMENTS:
            raise ConversionError(f"it calls something with {len(self.held):,} arguments")
        return self.size + sum(part.weight for part in self.held)


_ATOM, _MARK = _Thing(), _Thing()


def check_archive(path: Path) -> None:
    """Checks a torch file, which is an archive without compression.

    Raises:
        ConversionError: it holds more than its size, or a pickle in it does what `check_pickle` refuses.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ConversionError("it is a compressed archive, which torch never writes")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ConversionError("it is an archive that holds more than its size")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                with archive.open(entry) as file:
                    check_pickle(file)


def check_pickle(file: IO[bytes]) -> None:
    """Checks one pickle, up to its end; the file is left behind it.

    Raises:
        ConversionError: reading it would take more work than its size explains.
        Exception: it is damaged.
    """
    machine = _Machine()
    for code, argument, _ in pickletools.genops(file):
        machine.execute(code, argument)
    _check_unfolded(machine.made, machine.most)


class _Machine:
    """The stack and memo of an unpickler, with what is known of each object instead of the object.

    Attributes:
        made: every object that refers to others.
    """

    def __init__(self) -> None:
        self.stack: list[_Thing] = []
        self.memo: dict[int, _Thing] = {}
        self.made: list[_Thing] = []
        self.instructions = self.tuples = self.large = self.work = 0

    @property
    def most(self) -> int:
        """Parts that are explained by the instructions so far."""
        return PARTS + PARTS_PER_INSTRUCTION * self.instructions

    def execute(self, code: pickletools.OpcodeInfo, argument: Any) -> None:
        """One instruction."""
        self.instructions += 1
        name = code.name
        if name == "MARK":
            self.stack.append(_MARK)
        elif name in _GET:
            self.stack.append(self.memo[int(argument)])
        elif name in _PUT:
            self._put(len(self.memo) if argument is None else int(argument))
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name == "POP":
            self.stack.pop()
        elif name == "POP_MARK":
            self._until_mark()
        else:
            taken = self._take(code.stack_before)
            if name in _ADDS:
                self._add(*taken)
            elif name == "BUILD":
                self.work += taken[1].work()
                self.stack.append(taken[0])
            else:
                self.stack += [self._make(code, argument, taken)] * len(code.stack_after)
            if self.work > self.most:
                raise ConversionError("it hands the same large objects on again and again")

    def _put(self, index: int) -> None:
        if not 0 <= index <= 2 * self.instructions + 1000:
            raise ConversionError(f"its memo has room for {index:,} objects after {self.instructions:,} instructions")
        self.memo[index] = self.stack[-1]

    def _take(self, before: Sequence[pickletools.StackObject]) -> list[_Thing]:
        if pickletools.markobject not in before:
            return [self.stack.pop() for _ in before][::-1]
        taken = self._until_mark()
        return [self.stack.pop() for _ in before[: before.index(pickletools.markobject)]] + taken

    def _until_mark(self) -> list[_Thing]:
        taken = []
        while (thing := self.stack.pop()) is not _MARK:
            taken.append(thing)
        return taken[::-1]

    def _add(self, owner: _Thing, *items: _Thing) -> None:
        size = sum(item.size for item in items)
        self.work += size
        if owner.parts is not None:
            owner.weight += size
            owner.parts += items
        self.stack.append(owner)

    def _make(self, code: pickletools.OpcodeInfo, argument: Any, taken: list[_Thing]) -> _Thing:
        if code.name in _CALLS:
            self.work += sum(thing.work() for thing in taken)
        if code.name in _LONGS and abs(int(argument)) >= _LARGE:
            self.large += 1
            if self.large > MOST_LARGE_INTEGERS:
                raise ConversionError(f"it has more than {MOST_LARGE_INTEGERS:,} integers beyond 61 bits")
        if isinstance(argument, str | bytes | bytearray):
            return _Thing(1 + len(argument) // 8)
        if not taken and not any(kind in _CONTAINERS for kind in code.stack_after):
            return _ATOM
        thing = _Thing(1, taken, fixed=code.name in _FIXED)
        self.made.append(thing)
        self.tuples += thing.fixed
        if thing.depth > MOST_DEPTH:
            raise ConversionError(f"it has tuples {thing.depth} deep in each other")
        if self.tuples > MOST_TUPLES:
            raise ConversionError(f"it has more than {MOST_TUPLES:,} tuples")
        return thing


def _check_unfolded(made: Iterable[_Thing], most: int) -> None:
    """Refuses objects whose text would be longer than the file explains, or would go round in circles."""
    size: dict[int, int] = {}
    under_way: set[int] = set()
    for root in made:
        todo = [root]
        while todo:
            thing = todo[-1]
            if id(thing) in size:
                todo.pop()
                continue
            waiting = [part for part in thing.held if part.parts is not None and id(part) not in size]
            under_way.add(id(thing))
            if any(id(part) in under_way for part in waiting):
                raise ConversionError("it has objects that hold themselves")
            todo += waiting
            if not waiting:
                under_way.discard(id(thing))
                size[id(thing)] = 1 + sum(size.get(id(part), part.size) for part in thing.held)
                if size[id(thing)] > most:
                    raise ConversionError("it has objects that refer to the same ones again and again, without end")
