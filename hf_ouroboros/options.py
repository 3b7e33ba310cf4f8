"""Kinds of values that options take: what each may be, where it is checked, and what is said where it is not.

Tables of these say what `OuroborosArguments` (`argument_table.py`), delay compensations (the fields of their classes) and the
commands (their parsers) accept. Whatever is given, from Python, YAML, JSON or a command line, becomes the plain Python
value that the option stands for, or is refused by name.

    Whole(1, 64)       3, "3", numpy.int64(3)               not 3.0, True, "x", 65
    Number(0, 1)       0.5, "5e-1", 1, numpy.float32(0.5)   not nan, inf, True, [0.5]
    Flag()             True, "false", 0, numpy.bool_(True)  not 2, None, "maybe"
    OneOf("a", "b")    "a"                                  not "c", None, ["a"]
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import os
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from .errors import UnsupportedOptionError

YES, NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 160
_short.maxlong = 60
_short.maxlevel = 3


def shown(value: Any) -> str:
    """A value as error messages show it: `repr`, of bounded length and in bounded time whatever refers to what."""
    try:
        return shortened(_short.repr(value))
    except Exception:  # an integer of more digits than Python writes, or a class whose repr fails
        return f"<{type(value).__name__}>"


def shortened(text: str, most: int = 240) -> str:
    """A text, or its beginning and end."""
    return text if len(text) <= most else f"{text[: most - 60]} ... {text[-50:]}"


def plain(value: Any) -> Any:
    """The Python number or bool in a scalar of numpy or torch; anything else as it is."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return value.item()
    return value


def from_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class Rule:
    """What an option may be.

    Attributes:
        optional: whether None is allowed, too.
    """

    optional: bool = False

    @property
    def what(self) -> str:
        """What is allowed, as it follows "must be"."""
        raise NotImplementedError

    def read(self, value: Any) -> Any:
        """The value that is meant.

        Raises:
            ValueError: not allowed.
        """
        raise NotImplementedError

    def refusal(self, value: Any) -> str:
        """What is said of a value that is not allowed, after its name."""
        return f"{shown(value)} must be {self.what}{', or None' if self.optional else ''}"

    def __call__(self, text: str) -> Any:
        """Reads what was written on a command line; as `type` of an argparse argument."""
        try:
            return self.read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)} must be {self.what}") from None


@dataclass(frozen=True)
class Whole(Rule):
    """A whole number within bounds, both included."""

    least: int
    most: int
    optional: bool = field(default=False, kw_only=True)

    @property
    def what(self) -> str:
        return f"a whole number from {self.least:,} to {self.most:,}"

    def read(self, value: Any) -> int:
        value = plain(value)
        try:
            number = int(value) if isinstance(value, str) else operator.index(value)
        except (TypeError, ValueError):
            raise ValueError from None
        if isinstance(value, bool) or not self.least <= number <= self.most:
            raise ValueError
        return number


@dataclass(frozen=True)
class Number(Rule):
    """A number within bounds, both included unless it has to be `above` the lower or `below` the upper one."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = field(default=False, kw_only=True)
    below: bool = field(default=False, kw_only=True)
    infinite: bool = field(default=False, kw_only=True)
    optional: bool = field(default=False, kw_only=True)

    @property
    def what(self) -> str:
        parts = []
        if self.least > -math.inf:
            parts.append(f"{'above' if self.above else 'of at least'} {self.least:g}")
        if self.most < math.inf:
            parts.append(f"{'below' if self.below else 'of at most'} {self.most:g}")
        return f"a number{' ' if parts else ''}{' and '.join(parts)}{'' if self.infinite else ', finite'}"

    def read(self, value: Any) -> float:
        value = plain(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        try:
            number = float(value)
        except (OverflowError, ValueError):
            raise ValueError from None
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            raise ValueError
        if number < self.least or number > self.most:
            raise ValueError
        if (self.above and number == self.least) or (self.below and number == self.most):
            raise ValueError
        return number


@dataclass(frozen=True)
class Flag(Rule):
    """True or false, also in words."""

    optional: bool = field(default=False, kw_only=True)

    @property
    def what(self) -> str:
        return "True or False"

    def read(self, value: Any) -> bool:
        value = plain(value)
        if isinstance(value, str) and value.lower() in YES + NO:
            return value.lower() in YES
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        raise ValueError


class OneOf(Rule):
    """One of some words."""

    def __init__(self, *words: str | Mapping[str, Any]):
        """The words, or a registry of them, which may grow."""
        registry = words[0]
        self.words: Collection[str]
        if isinstance(registry, Mapping):
            self.words = registry.keys()
        else:
            self.words = tuple(word for word in words if isinstance(word, str))

    def __repr__(self) -> str:
        return f"OneOf{tuple(self.words)}"

    @property
    def what(self) -> str:
        return f"one of {', '.join(self.words)}"

    def refusal(self, value: Any) -> str:
        return f"{shown(value)} is unknown; use {self.what}"

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError
        return str(value)


@dataclass(frozen=True)
class Place(Rule):
    """The path of a file or folder; whether it is there or can be written is found out by who reads or writes it."""

    suffixes: tuple[str, ...] = ()
    folder: bool = field(default=False, kw_only=True)
    optional: bool = field(default=False, kw_only=True)

    @property
    def what(self) -> str:
        return f"the path of a {'folder' if self.folder else 'file'}" + (
            f" that ends in {' or '.join(self.suffixes)}" if self.suffixes else ""
        )

    def read(self, value: Any) -> str:
        if not isinstance(value, str | os.PathLike):
            raise ValueError
        path = os.fspath(value)
        if not isinstance(path, str) or not path or "\0" in path:
            raise ValueError
        if not self.folder and os.path.basename(path) in ("", ".", ".."):
            raise ValueError
        os.fsencode(path)  # some strings can't be the name of a file
        if self.suffixes and Path(path).suffix not in self.suffixes:
            raise ValueError
        return path


@dataclass(frozen=True)
class Words(Rule):
    """A list of names, each of them a string or what prints as one, such as a `torch.device`."""

    most: int
    example: str
    optional: bool = field(default=False, kw_only=True)

    @property
    def what(self) -> str:
        return f"a list of 1 to {self.most} names, e.g. {self.example}"

    def read(self, value: Any) -> list[str]:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not 1 <= len(value) <= self.most:
            raise ValueError
        if not all(isinstance(name, str) or type(name).__name__ == "device" for name in value):
            raise ValueError
        return [str(name) for name in value]


def read_option(name: str, value: Any, rule: Rule, where: str = "") -> Any:
    """The value of an option as its rule reads it.

    Args:
        name: of the option.
        value: as given.
        rule: what is allowed.
        where: what stands before the name in the message.

    Raises:
        UnsupportedOptionError: not allowed; says option, value, and what is allowed.
    """
    if value is None and rule.optional:
        return None
    try:
        return rule.read(value)
    except (ValueError, TypeError) as error:
        why = f" ({error})" if str(error) else ""
        raise UnsupportedOptionError(f"{where}{name}={rule.refusal(value)}{why}") from None


def read_options(owner: Any, table: Mapping[str, Rule]) -> None:
    """Reads the attributes of an object that a table names, and puts what they stand for in their place."""
    for name, rule in table.items():
        setattr(owner, name, read_option(name, getattr(owner, name), rule))


def option(default: Any, rule: Rule) -> Any:
    """A field of a `Checked` dataclass with what it may be."""
    return field(default=default, metadata={"rule": rule})


class Checked:
    """A dataclass whose fields made by `option` are read by their rules when it is made, however it is made.

    Attributes:
        given_by: the option that a message names before the field.
    """

    given_by: ClassVar[str] = ""
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # subclasses are dataclasses

    def __post_init__(self) -> None:
        where = f"{self.given_by}: " if self.given_by else ""
        for own in fields(self):
            if "rule" in own.metadata:
                value = read_option(own.name, getattr(self, own.name), own.metadata["rule"], where)
                object.__setattr__(self, own.name, value)
