"""What the fuzz tests share: how many examples, hostile values, and a command run as a user would run it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hf_ouroboros.cli import main

EXAMPLES = int(os.environ.get("HF_OUROBOROS_FUZZ_EXAMPLES", "12"))
"""Of each test; a few in every run of the tests, thousands once: HF_OUROBOROS_FUZZ_EXAMPLES=2000 pytest tests/test_fuzz*.py"""


def fuzzed(share: float = 1.0) -> Any:
    """Settings of a fuzz test; a share of the examples in every run of the tests where an example takes long."""
    count = EXAMPLES if EXAMPLES >= 1000 else max(3, round(EXAMPLES * share))
    unhurried = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, suppress_health_check=unhurried)


NUMBERS = [0, 1, 2, 3, -1, 7, 64, 10**9, -(10**9), 2**31, 2**63, 10**40, 0.0, 0.5, -0.5, 1e-300, 1e300, float("inf"),
           float("-inf"), float("nan"), True, False]  # fmt: skip
NO_SLASH = st.characters(exclude_characters="/", exclude_categories=())
TEXTS = st.one_of(
    st.text(NO_SLASH, max_size=12),
    st.sampled_from(["", " ", "\0", "-", "--", "=", ",", "{}", "[]", "null", "NaN", "\ud800", "\udcff", "x" * 5000, "[" * 5000,
                     "9" * 5000, "²", "true", "none", "&a [*a]", "!!python/object:os.system", "."]),
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.sampled_from(NUMBERS), st.integers(), st.floats(), TEXTS)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


@dataclass
class Outcome:
    """What a command did.

    Args:
        status: its exit status.
        out: what it printed.
        err: what it complained about.
        files: that are there afterwards and were not before, or are others now.
    """

    status: int
    out: str
    err: str
    files: set[str]


def command(folder: Path, *arguments: str) -> Outcome:
    """Runs a command in a folder, with streams that take ASCII only; asserts what holds for any command.

    That is: exit status 0, 1 or 2, a reason in a few lines where it is not 0, never a traceback, and no file that is left
    half-written or, after a failure, written at all.
    """
    before = _files(folder)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    home = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(list(arguments))
            except SystemExit as exit:
                status = exit.code
    finally:
        os.chdir(home)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("ascii"))
    outcome = Outcome(status, *texts, {name for name, _ in _files(folder).items() - before.items()})
    assert outcome.status in (0, 1, 2), outcome
    assert "Traceback" not in outcome.err
    assert not [name for name in outcome.files if ".writing" in name]
    if outcome.status:
        assert "error: " in outcome.err and len(outcome.err) < 20_000, outcome
        assert _files(folder) == before, outcome
    return outcome


def _files(folder: Path) -> dict[str, float]:
    return {
        os.path.relpath(Path(where, name), folder): Path(where, name).lstat().st_mtime_ns if name in files else 0
        for where, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


@contextlib.contextmanager
def cleaned(folder: Path, original: Path) -> Iterator[None]:
    """Makes a folder afterwards what its original is, of which it is a copy."""
    before = _files(folder)
    try:
        yield
    finally:
        if _files(folder) != before:
            shutil.rmtree(folder)
            shutil.copytree(original, folder, symlinks=True)


def replaced(value: Any, path: Sequence[int], new: Any) -> Any:
    """A copy of nested JSON in which the part that the numbers lead to is another one."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else range(len(value))
    chosen = keys[path[0] % len(keys)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    changed = {key: replaced(part, path[1:], new) if key == chosen else part for key, part in items}
    return changed if isinstance(value, dict) else list(changed.values())


sys.set_int_max_str_digits(4300)
