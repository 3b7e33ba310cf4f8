"""Old vocabularies (vocab.pkl, vocab.bin, vocab.txt) to fast tokenizers with the same ids, without pickle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ...errors import InputFileError
from ...options import shown
from ...user_files import read_text
from .errors import ConversionError
from .safe_pickle import Stub, load_pickle

EOS = "<eos>"
UNKNOWN = ("<unk>", "<UNK>")


@dataclass
class Vocabulary:
    """What an old vocabulary says.

    Args:
        words: in the order of their ids.
        lower_case: whether text is lower-cased first.
    """

    words: list[str]
    lower_case: bool = False


def read_vocabulary(path: str | Path, allow_stubs: bool = False) -> Vocabulary:
    """Reads and validates a vocabulary.

    Args:
        path: `.txt`: one word per line, followed by anything; else a pickle or torch file of the attributes of a
            tokenizer, or of the original repository's Vocab or Corpus (`cache.pt`; needs stubs).
        allow_stubs: see `safe_pickle.load_pickle`.

    Raises:
        ConversionError: an unsafe or damaged file, words that aren't unique, or ids that contradict each other.
    """
    path = Path(path)
    if path.suffix == ".txt":
        try:
            lines = read_text(path).splitlines()
        except InputFileError as error:
            raise ConversionError(f"{error}: a vocabulary is UTF-8 text with a word per line") from error
        vocabulary = Vocabulary([line.split()[0] for line in lines if line.strip()])
    else:
        vocabulary = _from_attributes(_attributes(load_pickle(path, allow_stubs)), path)
    if not vocabulary.words:
        raise ConversionError(f"{path} holds no words")
    seen: set[str] = set()
    for word in vocabulary.words:
        if word in seen:
            raise ConversionError(f"{path} holds {shown(word)} twice")
        seen.add(word)
    return vocabulary


def build_tokenizer(vocabulary: Vocabulary, add_eos: bool | None = None) -> PreTrainedTokenizerFast:
    """A fast tokenizer: words are what whitespace separates, ids those of the vocabulary.

    Words have to be separated as in the training data (WikiText-103: punctuation apart, numbers as `1 @,@ 000`).

    Args:
        vocabulary: the words.
        add_eos: whether `<eos>` is appended, as at the end of every line of the training data;
            `add_special_tokens=False` leaves it out of a single call. None: if the vocabulary has it.

    Raises:
        ConversionError: `<eos>` wanted but not in the vocabulary.
    """
    ids = {word: i for i, word in enumerate(vocabulary.words)}
    unknown = next((word for word in UNKNOWN if word in ids), None)
    eos = EOS if EOS in ids else None
    if add_eos and eos is None:
        raise ConversionError(f"add_eos=True, but the vocabulary has no {EOS}")
    # Without a word for unknown words the tokenizer raises an error when it meets one.
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown or UNKNOWN[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if vocabulary.lower_case:
        tokenizer.normalizer = normalizers.Lowercase()
    if eos is not None and add_eos is not False:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", pair=f"$A {EOS} $B:1 {EOS}:1", special_tokens=[(EOS, ids[EOS])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, eos_token=eos, clean_up_tokenization_spaces=False
    )


def _attributes(content: Any) -> dict[str, Any]:
    """The attributes of the vocabulary in a file: a dict, the stub of a Vocab, or that of a Corpus with one."""
    if isinstance(content, Stub):
        inner = content.__dict__.get("vocab")
        content = inner.__dict__ if isinstance(inner, Stub) else content.__dict__
    return content if isinstance(content, dict) else {}


def _from_attributes(attributes: dict[str, Any], path: Path) -> Vocabulary:
    words, ids = attributes.get("idx2sym"), attributes.get("sym2idx")
    if not isinstance(words, list) or not isinstance(ids, dict):
        raise ConversionError(f"{path} is no Transformer-XL vocabulary: it has no list idx2sym and dict sym2idx")
    for i, word in enumerate(words):
        if not isinstance(word, str):
            raise ConversionError(f"{path}: idx2sym[{i}] is {shown(word)}, not a word")
        if ids.get(word) != i:
            raise ConversionError(
                f"{path}: idx2sym[{i}] is {shown(word)}, but sym2idx has {shown(ids.get(word))} for it"
            )
    if len(ids) != len(words):
        raise ConversionError(f"{path}: sym2idx has {len(ids)} words, idx2sym {len(words)}")
    if attributes.get("delimiter") is not None:
        raise ConversionError(
            f"{path}: words are separated by {shown(attributes['delimiter'])}; only vocabularies for text that is split at "
            "whitespace can be converted"
        )
    return Vocabulary(words, bool(attributes.get("lower_case", False)))
