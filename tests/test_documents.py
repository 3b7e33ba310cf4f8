"""The documents: every link leads somewhere, every path that they name exists, and README stays short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDERS = ("hf_ouroboros", "recipes", "tests", "model_cards", ".ci")
DOCUMENTS = sorted([README, *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md") if "template" not in p.name)])
LINK = re.compile(r"\[[^\]]*\]\(<?([^)>\s]+)>?\)")
QUOTED = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?:\.ci|[\w*{])[\w.*{},/-]*")
KINDS = (".py", ".yaml", ".md", ".png", ".toml", "/")
NOT_HERE = ("results.md", "train.py", "script.py")  # a run's, or a user's

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(document: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def headings(document: Path) -> set[str]:
    """The names by which links reach a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def spelt_out(pattern: str) -> Iterator[str]:
    """A path for every choice in braces."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    yield from map("".join, product(*([",".join(p)] if i % 2 == 0 else p for i, p in enumerate(parts))))


def named_paths(document: Path) -> Iterator[str]:
    """What is meant as a path of this repository: in backticks, in a command, or a Python file anywhere."""
    text = document.read_text(encoding="utf-8")
    words = [word for quoted in QUOTED.findall(prose(document)) for word in quoted.split()]
    words += re.findall(r"(?:pytest|--config|--config_file|--grid) (\S+)", text)
    words += re.findall(r"[\w./*{},-]+\.py\b", text)
    for word in words:
        inside = word.partition("/")[0] in FOLDERS and "/" in word
        if PATH.fullmatch(word) and (inside or word.endswith(KINDS)) and word not in NOT_HERE:
            yield from spelt_out(word)


def exists(path: str, document: Path) -> bool:
    """Whether a path is there, seen from the top, from the package, from the recipes, or from beside the document."""
    places = (ROOT, ROOT / "hf_ouroboros", ROOT / "recipes", document.parent)
    return any(next(place.glob(path.rstrip("/")), None) is not None for place in places)


def test_documents_are_found() -> None:
    assert {README, ROOT / "hf_ouroboros/README.md", ROOT / "tests/README.md"} < set(DOCUMENTS)


def test_readme_is_short() -> None:
    text = README.read_bytes()
    assert text.count(b"\n") <= 160
    assert len(text) <= 14_000


def test_set_up_is_two_commands_and_ci_runs_the_second() -> None:
    set_up = README.read_text(encoding="utf-8").split("\n## ")[1]
    assert set_up.startswith("Set up\n")
    _, tests = re.findall(r"^```bash\n(.*)\n```$", set_up, flags=re.MULTILINE)
    assert f"\n{tests}\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(prose(document)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT.resolve()), f"{link} leaves the repository"
        if heading:
            assert heading in headings(target), f"{link}: no such heading"


@each_document
def test_named_paths_exist(document: Path) -> None:
    missing = {path for path in named_paths(document) if not exists(path, document)}
    assert not missing


@pytest.mark.parametrize("text", ["[a](no/such.md)", "[a](#no-such-heading)", "[a](README.md#no-such)"])
def test_a_wrong_link_is_noticed(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_documents.ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"# Title\n\n{text}\n")
    with pytest.raises(AssertionError, match="leads nowhere|no such heading"):
        test_links_lead_somewhere(tmp_path / "README.md")


@pytest.mark.parametrize("text", ["`engine/no_such.py`", "`recipes/{common,no_such}.py`", "`tests/no_such`"])
def test_a_wrong_path_is_noticed(text: str, tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"see {text}\n")
    assert len({path for path in named_paths(document) if not exists(path, document)}) == 1


def test_every_document_of_the_repository_is_reached_from_the_readme() -> None:
    reached, left = set(), [README]
    while left:
        document = left.pop()
        reached.add(document)
        for link in LINK.findall(prose(document)):
            target = (document.parent / link.partition("#")[0]).resolve()
            if target in set(DOCUMENTS) - reached and target not in left:
                left.append(target)
    assert reached == set(DOCUMENTS)
