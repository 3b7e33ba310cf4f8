"""What a stream of tokens costs a language model: every token but the first counts once, none is averaged away.

A model with memory reads the stream in segments and carries its memory from each to the next. Any other model reads
windows: the tokens to predict, and some before them once more as context. Both are moved on by `segment_length`:

    memory    [ m e m o r y ][segment]        window    [ o v e r l a p ][segment]
                     [ m e m o r y ][segment]                  [ o v e r l a p ][segment]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_ouroboros.data.prepared import TextUnits
from hf_ouroboros.data.stream import StreamCollator, StreamSegments
from hf_ouroboros.data.tokenizing import TokenArray


@dataclass(frozen=True)
class StreamLoss:
    """Sums over a stream; those of several streams may be added up.

    Args:
        nats: negative log-likelihood of all targets.
        targets: how many there are.
    """

    nats: float
    targets: int

    def metrics(self, units: TextUnits) -> dict[str, float]:
        """The usual figures: loss and perplexity per token, bits per byte and character, perplexity per word.

        Args:
            units: the text that all tokens of the stream stand for. The first token has no prediction; it is taken to
                cost what the others cost on average.
        """
        loss = self.nats / self.targets
        total = loss * (self.targets + 1)
        return {
            "loss": loss,
            "perplexity": _exp(loss),
            "bits_per_byte": total / units.bytes / math.log(2),
            "bits_per_character": total / units.characters / math.log(2),
            "word_perplexity": _exp(total / max(1, units.words)),
        }


def stream_loss(
    model: PreTrainedModel, tokens: TokenArray, segment_length: int, overlap: int = 0, columns: int = 1
) -> StreamLoss:
    """The loss of a model over a whole stream, its ragged tail included.

    Args:
        model: in evaluation mode. Of a Transformer-XL, the configuration says how it reads: `mem_len`, `clamp_len`,
            `same_length`.
        tokens: the stream, integers [tokens].
        segment_length: tokens predicted at a time.
        overlap: without memory only: tokens before each segment that are read once more.
        columns: rows of a batch. With memory, contiguous columns of the stream, the memory of each starting empty: with
            more columns more tokens miss a part of their context. Without, successive windows, to the same result.

    Raises:
        ValueError: an overlap for a model with memory, or windows longer than the model's positions.
        EmptyDataError: fewer targets than columns.
    """
    has_memory = hasattr(model.config, "mem_len")
    positions = getattr(model.config, "max_position_embeddings", None)
    if has_memory and overlap:
        raise ValueError(f"overlap={overlap} is for models without memory; this one remembers mem_len tokens.")
    if not has_memory and positions is not None and segment_length + overlap > positions:
        raise ValueError(
            f"segment_length={segment_length} and overlap={overlap} exceed the model's {positions} positions together."
        )
    if has_memory:
        read = _with_memory(model, tokens, segment_length, columns)
    else:
        read = _in_windows(model, tokens, segment_length, overlap, columns)
    nats, targets = [], 0
    with torch.inference_mode():
        for losses, count in read:
            nats.append(losses.sum(dtype=torch.float64).item())
            targets += count
    return StreamLoss(math.fsum(nats), targets)


def _with_memory(
    model: PreTrainedModel, tokens: TokenArray, segment_length: int, columns: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """Losses and number of targets of every segment of all columns."""
    data = StreamSegments(tokens, columns, segment_length, keep_tail=True)
    collate = StreamCollator(positions=False)
    mems = None
    for segment in tqdm(range(data.segments), disable=None):
        batch = collate([data[segment * columns + column] for column in range(columns)])
        targets = batch["shift_labels"]
        output = model(
            input_ids=batch["input_ids"].to(model.device),
            shift_labels=targets.to(model.device),
            mems=mems,
            return_logits=False,
        )
        mems = output.mems
        yield output.losses, int((targets != -100).sum())


def _in_windows(
    model: PreTrainedModel, tokens: TokenArray, segment_length: int, overlap: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """Losses and number of targets of every batch of windows; those that are shorter go alone."""
    windows: list[torch.Tensor] = []
    for start in tqdm(range(0, len(tokens) - 1, segment_length), disable=None):
        end = min(start + segment_length, len(tokens) - 1)
        first = max(0, start - overlap)
        window = torch.from_numpy(np.asarray(tokens[first : end + 1], dtype=np.int64))
        if end - start < segment_length or start - first < overlap:
            yield _window_losses(model, [window], end - start)
            continue
        windows.append(window)
        if len(windows) == batch_size:
            yield _window_losses(model, windows, segment_length)
            windows = []
    if windows:
        yield _window_losses(model, windows, segment_length)


def _window_losses(model: PreTrainedModel, windows: list[torch.Tensor], scored: int) -> tuple[torch.Tensor, int]:
    """Losses of the last `scored` targets of windows of equal length."""
    batch = torch.stack(windows).to(model.device)
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits[:, -scored:]
    losses = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, -scored:].flatten(), reduction="none")
    return losses, losses.numel()


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
