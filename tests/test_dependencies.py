"""Which part of the package knows which: dependencies point downwards, without circles, and the pure parts stay pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_ouroboros

ROOT = Path(hf_ouroboros.__file__).parent
MODULES = {
    ".".join((path.parent if path.name == "__init__.py" else path.with_suffix("")).relative_to(ROOT.parent).parts): path
    for path in ROOT.rglob("*.py")
}

PURE = {"simulate": ("torch", "transformers"), "schedules": ("torch", "transformers")}
"""What must not import what, however far down."""

UNAWARE = {
    "partition": ("engine", "processes", "hooks", "trainer"),
    "optim": ("engine", "processes", "hooks", "trainer"),
    "adapters": ("engine", "checkpoint", "processes", "hooks", "trainer"),
    "planning": ("engine", "processes", "hooks", "trainer"),
    "engine": ("checkpoint", "processes", "hooks", "trainer"),
    "checkpoint": ("processes", "hooks", "trainer"),
    "processes": ("hooks", "trainer"),
    "hub": ("engine", "hooks", "trainer"),
    "models": ("partition", "engine", "trainer"),
}
"""Which folder must not know which."""


def imported(body: list[ast.stmt], package: str) -> Iterator[str]:
    """Names of modules that are imported when a module is: not those within functions or for type checkers."""
    for statement in body:
        match statement:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pass
            case ast.If() | ast.Try():
                yield from imported(statement.body + statement.orelse, package)
            case ast.Import():
                yield from (name.name for name in statement.names)
            case ast.ImportFrom():
                parts = package.split(".")
                above = parts[: len(parts) - statement.level + 1] if statement.level else []
                source = ".".join([*above, *([statement.module] if statement.module else [])])
                for name in statement.names:
                    yield f"{source}.{name.name}" if f"{source}.{name.name}" in MODULES else source


@cache
def dependencies(module: str) -> frozenset[str]:
    """Modules, of this package or others, that a module imports."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return frozenset(imported(ast.parse(path.read_text(encoding="utf-8")).body, package)) - {module}


def part_of(module: str) -> str | None:
    """The folder or file at the top of the package that a module belongs to; None for the package itself."""
    return module.split(".")[1] if "." in module else None


def reachable(module: str) -> set[str]:
    waiting, seen = [module], set()
    while waiting:
        for each in dependencies(waiting.pop()):
            if each not in seen:
                seen.add(each)
                waiting += [each] if each in MODULES else []
    return seen


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """So each of them can be imported alone."""
    assert_no_circle({module: set(dependencies(module)) for module in MODULES})


def test_nor_do_folders() -> None:
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        if part := part_of(module):
            known = {part_of(each) for each in dependencies(module) if each in MODULES}
            graph.setdefault(part, set()).update(known - {part, None})
    assert_no_circle(graph)


@pytest.mark.parametrize("part", UNAWARE)
def test_a_part_does_not_know_those_above(part: str) -> None:
    inside = [module for module in MODULES if part_of(module) == part]
    assert inside
    for module in inside:
        assert not {part_of(each) for each in dependencies(module) if each in MODULES} & set(UNAWARE[part]), module


@pytest.mark.parametrize("part", PURE)
def test_a_pure_part_imports_no_library_of_tensors(part: str) -> None:
    inside = [
        m for m in MODULES if m.removeprefix("hf_ouroboros.").split(".")[: part.count(".") + 1] == part.split(".")
    ]
    assert inside
    for module in inside:
        libraries = {each.split(".")[0] for each in reachable(module)}
        assert not libraries & set(PURE[part]), (module, libraries)


def test_what_only_several_processes_need_is_not_imported_for_one() -> None:
    ones = {"processes", "files", "saving", "handshake", "run_digest", "meeting", "launch"}
    inside = {m.removeprefix("hf_ouroboros.processes.") for m in MODULES if m.startswith("hf_ouroboros.processes.")}
    assert ones < inside
    found = {m.removeprefix("hf_ouroboros.processes.") for m in reachable("hf_ouroboros.trainer")}
    assert found & inside == ones
    assert "hf_ouroboros.processes.channels" in reachable("hf_ouroboros.processes.several")


def test_a_circle_is_found() -> None:
    with pytest.raises(pytest.fail.Exception, match="a -> b -> a|b -> a -> b"):
        assert_no_circle({"a": {"b"}, "b": {"a"}})
