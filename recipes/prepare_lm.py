"""Turns raw enwik8, text8 or WikiText-103 into token streams that pretrain_lm.py and evaluate_lm.py read (data_dir).

    python recipes/prepare_lm.py --corpus enwik8 --source enwik8.zip --output_dir data/enwik8
    python recipes/prepare_lm.py --corpus text8 --source text8 --output_dir data/text8
    python recipes/prepare_lm.py --corpus wikitext103 --source wikitext-103 --output_dir data/wikitext103
    python recipes/prepare_lm.py --corpus wikitext103 --dataset_name Salesforce/wikitext --dataset_config wikitext-103-v1

enwik8 and text8 are cut 90 % / 5 % / 5 %, that is 90, 5 and 5 million bytes, a token per byte; a shorter file is cut in
proportion. WikiText-103 comes in three files; its words are the tokens, and `<eos>` ends every line.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import OptionError, print_table, run_recipe
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from hf_ouroboros.data import DataFileNotFoundError, byte_tokenizer, text_stream
from hf_ouroboros.data.prepared import PreparedSplit, PreparedStreams, count_units
from hf_ouroboros.data.words import word_tokenizer

FULL_SIZE = 100_000_000  # bytes of enwik8, and of text8
TEXT8 = b"abcdefghijklmnopqrstuvwxyz "
SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # ours: as the files of WikiText call them


@dataclass
class ScriptArguments:
    """What to prepare, from where."""

    corpus: str = field(metadata={"help": "What it is.", "choices": ["enwik8", "text8", "wikitext103"]})
    source: str | None = field(
        default=None,
        metadata={"help": "The raw file (or a zip of it); of WikiText-103, the folder of its three files."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set of the Hub, or a local folder of one."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    output_dir: str | None = field(default=None, metadata={"help": "Where to write. Default: data/<corpus>."})
    newlines: str = field(
        default="kept",
        metadata={
            "help": "enwik8: 'kept', the raw bytes; 'dropped', as its usual preparation for Transformer-XL loses them, for "
            "comparison with published figures.",
            "choices": ["kept", "dropped"],
        },
    )


def prepare_bytes(script: ScriptArguments) -> tuple[PreparedStreams, PreTrainedTokenizerBase]:
    """enwik8 or text8: every byte is a token."""
    data = _raw_bytes(script)
    if script.corpus == "text8" and (others := set(data) - set(TEXT8)):
        raise OptionError(f"source: text8 has only a-z and spaces, this has {len(others)} other bytes; is it enwik8?")
    size = f"{len(data):,} bytes, cut 90/5/5 %" + ("" if len(data) == FULL_SIZE else " (not the complete file)")
    cuts = (0, len(data) * 90 // 100, len(data) * 95 // 100, len(data))
    splits = {}
    for name, start, end in zip(SPLITS, cuts, cuts[1:], strict=False):
        part = data[start:end]
        words = count_units([part]).words  # while the newlines still separate them
        if script.newlines == "dropped":
            part = part.replace(b"\n", b"")
        units = dataclasses.replace(count_units([part]), words=words)
        splits[name] = PreparedSplit(np.frombuffer(part, dtype=np.uint8), units)
    if script.corpus == "enwik8":
        size += f", newlines {script.newlines}"
    return PreparedStreams(f"{script.corpus}: {size}.", splits), byte_tokenizer()


def prepare_words(script: ScriptArguments) -> tuple[PreparedStreams, PreTrainedTokenizerBase]:
    """WikiText-103: every word is a token, and the end of every line."""
    tokenizer = word_tokenizer(_lines(script, "train"))
    splits = {
        name: PreparedSplit(text_stream(_lines(script, name), tokenizer), count_units(_lines(script, name)))
        for name in SPLITS
    }
    return PreparedStreams(
        f"WikiText-103: {len(tokenizer):,} words, <eos> at the end of every line.", splits
    ), tokenizer


def _raw_bytes(script: ScriptArguments) -> bytes:
    if script.source is None:
        return "\n".join(row.removesuffix("\n") for row in _load_split(script, "train")).encode()
    path = Path(script.source)
    if not path.is_file():
        raise DataFileNotFoundError(f"source: no file at {path}.")
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) != 1:
            raise OptionError(
                f"source: {path} holds {len(names)} files, not the one of {script.corpus}; unpack it first"
            )
        return archive.read(names[0])


def _lines(script: ScriptArguments, split: str) -> Iterator[str]:
    """The lines of one part of WikiText-103."""
    if script.source is None:
        yield from _load_split(script, split)
        return
    found = sorted(Path(script.source).glob(f"*{SPLITS[split]}*"))
    if len(found) != 1:
        raise DataFileNotFoundError(
            f"source: {script.source} needs one file with {SPLITS[split]!r} in its name, such as "
            f"wiki.{SPLITS[split]}.tokens; it has {[path.name for path in found]}."
        )
    with open(found[0], encoding="utf-8", newline="\n") as file:
        yield from file


def _load_split(script: ScriptArguments, split: str) -> Iterator[str]:
    """The rows of a data set, which are lines, or the whole text."""
    import datasets

    rows = datasets.load_dataset(script.dataset_name, script.dataset_config, split=split)
    for batch in rows.iter(batch_size=1000):
        yield from batch["text"]


def main() -> None:
    """Reads, tokenizes, writes, and shows the sizes."""
    (script,) = HfArgumentParser(ScriptArguments, description=__doc__).parse_args_into_dataclasses()
    if (script.source is None) == (script.dataset_name is None):
        raise OptionError("give source or dataset_name, one of the two")
    if script.newlines == "dropped" and script.corpus != "enwik8":
        raise OptionError(f"newlines='dropped' is a variant of enwik8, not of {script.corpus}; leave it out")
    streams, tokenizer = (prepare_words if script.corpus == "wikitext103" else prepare_bytes)(script)
    folder = Path(script.output_dir or f"data/{script.corpus}")
    streams.save(folder, tokenizer)
    rows = []
    for name, split in streams.splits.items():
        rows.append((name, f"{len(split.tokens):,} tokens, {len(np.unique(split.tokens)):,} different"))
    print_table(f"{folder}: {streams.description}", rows)


if __name__ == "__main__":
    run_recipe(main)
