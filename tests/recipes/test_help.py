"""Every recipe says what its options are."""

from __future__ import annotations

import importlib
import sys

import benchmark
import pytest
from running import RECIPES

PROGRAMS = sorted(path.stem for path in RECIPES.glob("*.py") if "def main()" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for variable, value in benchmark.MALLOC.items():  # otherwise it starts itself again with them
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        importlib.import_module(name).main()
    printed = capsys.readouterr().out
    assert printed.startswith("usage: ") and printed.count("\n  --") > 1


def test_programs_are_found() -> None:
    assert {"benchmark", "pretrain_lm", "staleness_study"} <= set(PROGRAMS)
