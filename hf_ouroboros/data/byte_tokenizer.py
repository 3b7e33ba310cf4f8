"""A tokenizer without a vocabulary to learn: one id per byte, and an end-of-text token."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
BYTE_VOCAB_SIZE = 257


def byte_tokenizer(model_max_length: int = 1024) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose ids 0..255 are the bytes of the UTF-8 text and 256 is `<|endoftext|>`.

    Every text survives `decode(encode(text))` unchanged. As with GPT-2, `<|endoftext|>` is at once the
    beginning, end, padding and unknown token, is never added by itself, and is recognised where it stands in
    a text (pass `split_special_tokens=True` to read it as plain characters). A saved copy loads with
    `AutoTokenizer.from_pretrained`, without this package.

    Args:
        model_max_length: the longest input of the model in tokens, for truncation and length warnings.
    """
    vocabulary = {character: byte for byte, character in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, END_OF_TEXT: 256}, merges=[]))
    # No merges, so splitting into words would change nothing but the time it takes.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,  # would drop the space before punctuation when decoding
    )


def _byte_characters() -> dict[int, str]:
    """The printable character by which byte-level tokenizers write each byte (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the other bytes follow, in order, from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
