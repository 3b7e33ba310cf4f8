"""Kinds of values: what is taken, as which Python value, and what is said of everything else."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_ouroboros.errors import UnsupportedOptionError
from hf_ouroboros.options import Flag, Number, OneOf, Place, Rule, Whole, Words, from_json, read_option, shown

TAKEN: list[tuple[Rule, Any, Any]] = [
    (Whole(1, 9), "3", 3),
    (Whole(1, 9), np.uint8(9), 9),
    (Whole(1, 9), torch.tensor(1), 1),
    (Number(0, 1), "5e-1", 0.5),
    (Number(0, 1), 1, 1.0),
    (Number(0, 1), np.float32(0.5), 0.5),
    (Number(infinite=True), "-inf", -math.inf),
    (Flag(), "No", False),
    (Flag(), 1, True),
    (Flag(), torch.tensor(True), True),
    (OneOf("a", "b"), "b", "b"),
    (Place(), Path("a/b"), "a/b"),
    (Place((".png",)), "a.png", "a.png"),
    (Place(folder=True), ".", "."),
    (Words(2, "x"), ("a", torch.device("cpu")), ["a", "cpu"]),
]
REFUSED: list[tuple[Rule, list[Any], str]] = [
    (Whole(1, 9), [0, 10, 3.0, "3.0", True, None, [3], {}, "9" * 9999, np.array([3]), 10**5000], "a whole number from 1 to 9"),
    (
        Number(0, 1, below=True),
        [1, -0.1, math.nan, math.inf, "nan", "x", False, None, 1j, 10**400, b"0"],
        "a number of at least 0 and below 1, finite",
    ),
    (Number(0, above=True), [0, "-0"], "a number above 0, finite"),
    (Flag(), [2, -1, 0.0, None, "maybe", ""], "True or False"),
    (OneOf("a", "b"), ["c", None, ["a"], 0], "one of a, b"),
    (Place(), ["", ".", "a/..", "a/", "a\0", "\ud800", 3, None, b"a"], "the path of a file"),
    (Place((".png", ".html")), ["a.svg", "png"], "the path of a file that ends in .png or .html"),
    (Words(2, "x"), ["a", [], ["a"] * 3, [1], {"a": 1}], "a list of 1 to 2 names, e.g. x"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "given", "meant"), TAKEN, ids=str)
def test_taken(rule: Rule, given: Any, meant: Any) -> None:
    found = read_option("it", given, rule)
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize(("rule", "values", "allowed"), REFUSED, ids=lambda value: type(value).__name__)
def test_refused(rule: Rule, values: list[Any], allowed: str) -> None:
    for value in values:
        with pytest.raises(UnsupportedOptionError, match=f"^where: it=.*{allowed}") as caught:
            read_option("it", value, rule, where="where: ")
        assert len(str(caught.value)) < 500
        if isinstance(value, str):
            with pytest.raises(argparse.ArgumentTypeError, match=allowed):
                rule(value)


def test_none_where_it_is_allowed() -> None:
    assert read_option("it", None, Whole(1, 2, optional=True)) is None
    with pytest.raises(UnsupportedOptionError, match="it=3 must be a whole number from 1 to 2, or None"):
        read_option("it", 3, Whole(1, 2, optional=True))


def test_any_value_is_shown_in_a_line() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError

    nested: Any = []
    for _ in range(60):
        nested = [nested, nested]
    cycle: list[Any] = []
    cycle.append(cycle)
    for value in (nested, cycle, Hostile(), 10**5000, "x" * 10**6, {i: "y" * 99 for i in range(999)}, torch.ones(9999)):
        assert 0 < len(shown(value)) <= 240


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_no_json(text: str) -> None:
    with pytest.raises(ValueError):
        from_json(text)
