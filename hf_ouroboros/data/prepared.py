"""Token streams on disk: prepared once, mapped into memory by every run.

data/enwik8/
  train.npy, validation.npy, test.npy     the tokens, in the smallest unsigned integer type that holds them
  stream.json                             what they are, and how much text they stand for
  tokenizer.json, ...                     the tokenizer that made them; loads with AutoTokenizer
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hf_ouroboros.data.errors import DataError, DataFileNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "stream.json"
FORMAT = 1


@dataclass(frozen=True)
class TextUnits:
    """How much text a stream stands for, whatever its tokens are.

    Args:
        bytes: bytes of UTF-8.
        characters: Unicode characters.
        words: what white space separates.
    """

    bytes: int
    characters: int
    words: int


def count_units(texts: Iterable[str | bytes]) -> TextUnits:
    """Bytes, characters and words of all texts together (bytes that are no UTF-8 count as characters of their own)."""
    total = np.zeros(3, dtype=np.int64)
    for text in texts:
        data, text = (text.encode(), text) if isinstance(text, str) else (text, text.decode(errors="replace"))
        total += (len(data), len(text), len(data.split()))
    return TextUnits(*total.tolist())


@dataclass(frozen=True)
class PreparedSplit:
    """One part of a corpus.

    Args:
        tokens: the stream, integers [tokens].
        units: the text that it stands for.
    """

    tokens: npt.NDArray[np.integer]
    units: TextUnits


@dataclass(frozen=True)
class PreparedStreams:
    """A corpus as token streams.

    Args:
        description: one sentence: what text, in which variant.
        splits: by name: `train`, `validation`, and maybe `test`.
    """

    description: str
    splits: Mapping[str, PreparedSplit]

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes streams and tokenizer into a folder, `stream.json` last: without it, nothing is taken for complete."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).unlink(missing_ok=True)
        facts = {}
        for name, split in self.splits.items():
            largest = int(split.tokens.max(initial=0))
            np.save(folder / f"{name}.npy", split.tokens.astype(np.min_scalar_type(largest)))
            facts[name] = {"tokens": len(split.tokens), **dataclasses.asdict(split.units)}
        tokenizer.save_pretrained(folder)
        text = json.dumps({"format": FORMAT, "description": self.description, "splits": facts}, indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> PreparedStreams:
        """Maps the streams of a folder into memory.

        Raises:
            DataFileNotFoundError: the folder has no prepared streams, or lacks one of them.
            DataError: another version's, or a stream of another length than it should have.
        """
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise DataFileNotFoundError(
                f"data_dir: no prepared streams in {folder} (recipes/prepare_lm.py makes them)."
            )
        described = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if described.get("format") != FORMAT:
            raise DataError(
                f"data_dir: {folder / FILE} has format {described.get('format')}, this version reads {FORMAT}; prepare the "
                "data again."
            )
        splits = {}
        for name, facts in described["splits"].items():
            path = folder / f"{name}.npy"
            if not path.is_file():
                raise DataFileNotFoundError(f"data_dir: {path} is missing; prepare the data again.")
            tokens = np.load(path, mmap_mode="r")
            if len(tokens) != facts["tokens"]:
                raise DataError(f"data_dir: {path} has {len(tokens)} tokens, not {facts['tokens']}; prepare it again.")
            splits[name] = PreparedSplit(tokens, TextUnits(facts["bytes"], facts["characters"], facts["words"]))
        return cls(described["description"], splits)

    def split(self, name: str) -> PreparedSplit:
        """One part of the corpus.

        Raises:
            DataError: there is none of that name.
        """
        if name not in self.splits:
            raise DataError(f"split={name!r} isn't among the prepared ones: {', '.join(self.splits)}.")
        return self.splits[name]
