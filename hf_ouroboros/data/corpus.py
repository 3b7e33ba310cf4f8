"""The offline default corpus: the standard library sources that come with every Python."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_ouroboros.data.errors import NoStdlibSourcesError

# Not library code: installed packages, tests, and (encodings, pydoc_data, _sysconfigdata) generated tables.
_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "turtledemo"}
    | {"encodings", "pydoc_data"}
)
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")
# Written by the distribution or the user, not by Python's authors.
_EXCLUDED_FILES = frozenset({"sitecustomize.py", "usercustomize.py"})


@dataclass(frozen=True)
class Document:
    """A named text: `name` is the posix path in the library, `text` its content with `\\n` line ends."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for validation; no file is in both."""

    train: list[Document]
    validation: list[Document]

    @property
    def train_texts(self) -> list[str]:
        """The training texts, in the order of the documents."""
        return [document.text for document in self.train]

    @property
    def validation_texts(self) -> list[str]:
        """The validation texts, in the order of the documents."""
        return [document.text for document in self.validation]


def default_corpus(
    max_bytes: int | None = None, validation_share: float = 0.1, stdlib: str | os.PathLike[str] | None = None
) -> Corpus:
    """The standard library of this Python, split by file into training and validation documents.

    The same Python version gives the same corpus on every machine; another version gives another one. A
    file's side depends on its path only, so a smaller `max_bytes` never moves a file between training and
    validation.

    Args:
        max_bytes: upper bound of the UTF-8 bytes of both parts together, sampled over the whole library
            (about `validation_share` of it goes to validation); None takes everything (some 10 MB).
        validation_share: share of the files that is held out, between 0 and 1, both excluded.
        stdlib: the folder to read instead of this Python's standard library.

    Raises:
        NoStdlibSourcesError: the folder holds no usable `.py` files (a zipped or stripped standard library).
        ValueError: an argument is out of range, or `max_bytes` is too small to fill both parts.
    """
    if not 0.0 < validation_share < 1.0:
        raise ValueError(f"validation_share must be above 0 and below 1, got {validation_share}.")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be positive or None, got {max_bytes}.")
    root = Path(sysconfig.get_paths()["stdlib"] if stdlib is None else stdlib)
    names = _source_names(root)
    held_out = {name for name in names if _hash_fraction("split", name) < validation_share}
    train_bytes, validation_bytes = None, None
    if max_bytes is not None:
        validation_bytes = round(max_bytes * validation_share)
        train_bytes = max_bytes - validation_bytes
    corpus = Corpus(
        train=_take(root, [name for name in names if name not in held_out], train_bytes),
        validation=_take(root, sorted(held_out), validation_bytes),
    )
    if corpus.train and corpus.validation:
        return corpus
    if max_bytes is not None:
        raise ValueError(
            f"max_bytes={max_bytes} leaves no whole line for training or validation "
            f"(validation_share={validation_share}); take at least a few thousand bytes."
        )
    raise NoStdlibSourcesError(
        f"{root} holds {len(names)} usable .py files, too few for training and validation: this Python's "
        "standard library is zipped or stripped. Name a text file instead (train_file), or use a Python "
        "with its sources."
    )


def _source_names(root: Path) -> list[str]:
    """Relative posix paths of the library's own source files, sorted."""

    def walk() -> Iterator[str]:
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [name for name in subfolders if not _is_excluded(name)]
            for name in files:
                path = Path(folder, name)
                if path.suffix == ".py" and not _is_excluded(name) and not path.is_symlink():
                    yield path.relative_to(root).as_posix()

    return sorted(walk())


def _is_excluded(name: str) -> bool:
    return name in _EXCLUDED_FOLDERS or name in _EXCLUDED_FILES or name.startswith(_EXCLUDED_PREFIXES)


def _hash_fraction(purpose: str, name: str) -> float:
    """A number in [0, 1) that depends on its arguments only (Python's own `hash` is salted per process)."""
    digest = hashlib.sha256(f"{purpose}:{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _take(root: Path, names: Iterable[str], max_bytes: int | None) -> list[Document]:
    """Read the files, in an order that is random but fixed, until `max_bytes` is full; return them by name.

    The document that crosses the bound is cut after a line, so large files are as likely as small ones.
    """
    documents = []
    room = max_bytes
    for name in sorted(names, key=lambda name: _hash_fraction("order", name)):
        content = _read_utf8(root / name)
        if not content:
            continue
        if room is not None and len(content) > room:
            content = content[: content.rfind(b"\n", 0, room) + 1]
            room = 0
        elif room is not None:
            room -= len(content)
        if content:
            documents.append(Document(name, content.decode()))
        if room == 0:
            break
    return sorted(documents, key=lambda document: document.name)


def _read_utf8(path: Path) -> bytes | None:
    """The file's bytes with `\\n` line ends, or None if it is not UTF-8 text."""
    content = path.read_bytes().replace(b"\r\n", b"\n")
    try:
        content.decode()
    except UnicodeDecodeError:
        return None
    return content
