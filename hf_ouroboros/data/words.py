"""A word-level tokenizer from the training text, as language models on WikiText-103 use it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from hf_ouroboros.models.transfo_xl.vocabulary import EOS, UNKNOWN, Vocabulary, build_tokenizer


def word_tokenizer(texts: Iterable[str], max_words: int | None = None) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose words are what white space separates, the most frequent first.

    Id 0 is `<eos>`, which ends every line (`text_stream` gives it the text line by line); then the adaptive softmax's
    shortlist has the frequent words. Words of equal frequency keep the order in which they appear. `<unk>` comes where
    the text has it, else last.

    Args:
        texts: the training text, for instance its lines.
        max_words: keep only so many words; the others become `<unk>`. None keeps all.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    counts.pop(EOS, None)
    words = [EOS, *(word for word, _ in counts.most_common(max_words))]
    unknown = UNKNOWN[0]
    return build_tokenizer(Vocabulary(words if unknown in words else [*words, unknown]))
