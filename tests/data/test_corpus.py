from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_ouroboros.data import Corpus, NoStdlibSourcesError, default_corpus

# Loads corpus.py without its package, whose import of torch would take most of the test's time.
STUB_PACKAGE = (
    "import types, os; [sys.modules.__setitem__(name, types.ModuleType(name)) or "
    "setattr(sys.modules[name], '__path__', [name.replace('.', os.sep)]) "
    "for name in ('hf_ouroboros', 'hf_ouroboros.data')];"
)


@pytest.fixture(scope="module")
def whole() -> Corpus:
    return default_corpus()


def names(corpus: Corpus) -> tuple[list[str], list[str]]:
    return [document.name for document in corpus.train], [document.name for document in corpus.validation]


def size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def test_takes_library_sources_in_order_and_each_file_once(whole: Corpus) -> None:
    train, validation = names(whole)
    assert train == sorted(train) and validation == sorted(validation)
    assert len({*train, *validation}) == len(train) + len(validation) > 300
    assert {"argparse.py", "json/decoder.py"} <= {*train, *validation}
    assert all(text for text in whole.train_texts + whole.validation_texts)
    assert not any("\r\n" in text for text in whole.train_texts)


@pytest.mark.parametrize("folder", ["site-packages", "test", "tests", "idle_test", "encodings", "turtledemo"])
def test_leaves_out_what_is_not_the_library(whole: Corpus, folder: str) -> None:
    assert not any(folder in name.split("/") for part in names(whole) for name in part)


def test_holds_out_about_a_tenth(whole: Corpus) -> None:
    train, validation = names(whole)
    assert 0.06 < len(validation) / (len(train) + len(validation)) < 0.14


def test_bound_samples_the_whole_library_and_keeps_every_file_on_its_side(whole: Corpus) -> None:
    small = default_corpus(max_bytes=500_000)
    for part, all_of_it in zip(names(small), names(whole), strict=True):
        assert set(part) <= set(all_of_it)
    assert 450_000 < size(small.train_texts) + size(small.validation_texts) <= 500_000
    assert 40_000 < size(small.validation_texts) <= 50_000
    initials = {name[0] for name in names(small)[0]}
    assert len(initials) > 8 and max(initials) > "s"


def test_a_cut_document_is_a_prefix_that_ends_with_a_line(whole: Corpus) -> None:
    texts = {document.name: document.text for document in whole.train}
    cut = [doc for doc in default_corpus(max_bytes=100_000).train if doc.text != texts[doc.name]]
    assert len(cut) == 1
    assert texts[cut[0].name].startswith(cut[0].text) and cut[0].text.endswith("\n")


def test_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import hashlib; from hf_ouroboros.data.corpus import default_corpus; "
        "c = default_corpus(max_bytes=50_000); "
        "print(hashlib.sha256(repr(c).encode()).hexdigest())"
    )
    root = Path(__file__).parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", "import sys; sys.path.insert(0, '.');" + STUB_PACKAGE + code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_skips_files_that_are_not_utf8_and_normalises_line_ends(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"module_{i}.py").write_bytes(b"x = 1\r\n")
    (tmp_path / "latin.py").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.py").touch()
    (tmp_path / "notes.txt").write_text("not python")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_module.py").write_text("assert True\n")
    corpus = default_corpus(stdlib=tmp_path)
    assert sum(map(len, names(corpus))) == 40
    assert {*corpus.train_texts, *corpus.validation_texts} == {"x = 1\n"}


def test_without_sources_names_the_folder_and_a_way_out(tmp_path: Path) -> None:
    zipped = tmp_path / "python311.zip"
    with pytest.raises(NoStdlibSourcesError, match=r"python311\.zip holds 0 usable .*train_file"):
        default_corpus(stdlib=zipped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_share": 0.0}, "validation_share must be above 0"),
        ({"validation_share": 1.0}, "validation_share must be above 0"),
        ({"max_bytes": 0}, "max_bytes must be positive"),
        ({"max_bytes": 3}, "max_bytes=3 leaves no whole line"),
    ],
)
def test_refuses_bounds_that_leave_nothing(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        default_corpus(**options)
