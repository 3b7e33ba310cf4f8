"""Prompt and completion pairs: the loss counts the completion only."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_ouroboros.data.errors import EmptyDataError, MissingColumnError
from hf_ouroboros.data.tokenizing import TokenArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100  # what torch's cross entropy and Transformers' losses leave out


class CompletionDataset(Dataset[dict[str, Tensor]]):
    """Tokenized prompt and completion pairs as a map-style dataset.

    Item i is `{"input_ids", "labels"}`, int64 of shape [tokens of example i]. The ids are the prompt,
    tokenized as for generation, then the completion, then the end-of-text token; labels are -100 over the
    prompt.

    An example longer than `max_length` loses the beginning of its prompt first. Only if the completion alone
    is too long, its end goes too (the end-of-text token with it): a cut completion does not end there. At
    least one token stays in front of the completion, because the first token of a sequence is never
    predicted.

    Args:
        examples: mappings with `prompt` and `completion`; a `datasets.Dataset` or a list.
        tokenizer: any Transformers tokenizer that has an `eos_token`.
        max_length: longest example in tokens, at least 2.
        on_empty: what to do with an example whose completion is blank: `"error"` or `"drop"`.

    Attributes:
        dropped: number of examples dropped because their completion was blank.
        cut_prompts: number of examples whose prompt lost its beginning.
        cut_completions: number of examples whose completion lost its end.

    Raises:
        MissingColumnError: an example has no prompt or no completion, or one that is not a string.
        EmptyDataError: a completion is blank (`on_empty="error"`), or no example is left.
        ValueError: `max_length` or `on_empty` is not allowed, or the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        examples: Iterable[Mapping[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        on_empty: Literal["error", "drop"] = "error",
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 (a token and its successor), got {max_length}.")
        if on_empty not in ("error", "drop"):
            raise ValueError(f"on_empty must be 'error' or 'drop', got {on_empty!r}.")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no eos_token to end completions: set it first.")
        self.dropped = self.cut_prompts = self.cut_completions = 0
        prompts, completions = self._usable(examples, on_empty)
        tokens: list[TokenArray] = []
        prompt_lengths: list[int] = []
        for start in range(0, len(prompts), 1000):
            batch = slice(start, start + 1000)
            for prompt, completion in zip(
                tokenizer(prompts[batch], verbose=False)["input_ids"],
                tokenizer(completions[batch], add_special_tokens=False, verbose=False)["input_ids"],
                strict=True,
            ):
                prompt, completion = self._cut(prompt, [*completion, tokenizer.eos_token_id], max_length)
                tokens.append(np.asarray([*prompt, *completion], dtype=np.int32))
                prompt_lengths.append(len(prompt))
        # One tensor each, not one per example: data loader workers share tensors by file descriptor.
        self._tokens = torch.from_numpy(np.concatenate(tokens))
        self._ends = torch.tensor([len(example) for example in tokens]).cumsum(dim=0)
        self._prompt_lengths = torch.tensor(prompt_lengths)
        if self.dropped or self.cut_prompts or self.cut_completions:
            logger.warning(
                "%d examples with a blank completion dropped; %d prompts and %d completions cut to fit max_length=%d.",
                *(self.dropped, self.cut_prompts, self.cut_completions, max_length),
            )

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index > 0 else 0
        input_ids = self._tokens[start : self._ends[index]].long()
        labels = input_ids.clone()
        labels[: self._prompt_lengths[index]] = IGNORE_INDEX
        return {"input_ids": input_ids, "labels": labels}

    def _usable(
        self, examples: Iterable[Mapping[str, str]], on_empty: Literal["error", "drop"]
    ) -> tuple[list[str], list[str]]:
        """Prompts and completions of the examples that have something to learn from."""
        prompts, completions = [], []
        for index, (prompt, completion) in enumerate(_pairs(examples)):
            if completion.strip():
                prompts.append(prompt)
                completions.append(completion)
            elif on_empty == "drop":
                self.dropped += 1
            else:
                raise EmptyDataError(
                    f"Example {index} has a blank completion {completion!r}: fix it, or pass on_empty='drop'."
                )
        if not prompts:
            raise EmptyDataError(f"No example with a completion is left ({self.dropped} had a blank one).")
        return prompts, completions

    def _cut(self, prompt: list[int], completion: list[int], max_length: int) -> tuple[list[int], list[int]]:
        """The end of the prompt and the beginning of the completion that fit, counting what is cut."""
        room = max_length - min(1, len(prompt))
        if len(completion) > room:
            completion = completion[:room]
            self.cut_completions += 1
        room = max_length - len(completion)
        if len(prompt) > room:
            prompt = prompt[len(prompt) - room :]
            self.cut_prompts += 1
        return prompt, completion


class CompletionCollator:
    """Pads examples of different length to a batch, on the right.

    Args:
        tokenizer: its `pad_token` (else its `eos_token`) fills `input_ids`.
        pad_to_multiple_of: round the length of the batch up to a multiple of this.

    Returns (when called with a list of `{"input_ids", "labels"}`):
        `input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `labels` (-100 on padding), all int64 of
        shape [examples, tokens of the longest one].

    Raises:
        ValueError: the tokenizer has neither a padding nor an end-of-text token, or `pad_to_multiple_of` < 1.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> None:
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be positive or None, got {pad_to_multiple_of}.")
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if self.pad_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no pad_token and no eos_token: set one first.")

    def __call__(self, examples: list[Mapping[str, Tensor | list[int]]]) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        multiple = self.pad_to_multiple_of or 1
        shape = (len(examples), -(-length // multiple) * multiple)
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE_INDEX),
        }
        for row, example in enumerate(examples):
            tokens = len(example["input_ids"])
            batch["input_ids"][row, :tokens] = torch.as_tensor(example["input_ids"])
            batch["attention_mask"][row, :tokens] = 1
            batch["labels"][row, :tokens] = torch.as_tensor(example["labels"])
        return batch


def _pairs(examples: Iterable[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    for index, example in enumerate(examples):
        for column in ("prompt", "completion"):
            if not isinstance(example.get(column), str):
                raise MissingColumnError(
                    f"Example {index} needs a string in {column!r}, got {example.get(column)!r}; its columns "
                    f"are {sorted(example)}."
                )
        yield example["prompt"], example["completion"]
