"""What TRL's losses ask of a model, `model(..., fused_lm_head=True)`: of its logits, or of late ones, which are never made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput

from ..partition.late_logits import LateLogits, late_logits_wanted

TILE = 32768
"""Logits of a token that exist at a time where they are late, as in TRL."""


class FusedHead(nn.Module):
    """Stands in for a model with TRL's fused head; the model is run once, however often this is called.

    Args:
        call: gives the model's output, with logits, for inputs without labels.
        fields: of the head's output, see `fused_output`.
        late: whether logits need not be made for it.
        scope: entered where the head computes.
        whole: the batch, which the stages have computed; None for what this is called with.
        rows: those of it that this is called with; None for all.

    Attributes:
        measured: the head's newest output; None before the first.
    """

    def __init__(
        self,
        call: Callable[..., ModelOutput],
        fields: Collection[str],
        late: bool = False,
        scope: Callable[[], AbstractContextManager[None]] = nullcontext,
        whole: Mapping[str, Any] | None = None,
        rows: torch.Tensor | None = None,
    ):
        super().__init__()
        self._call, self._fields, self._late, self._scope = call, fields, late, scope
        self._whole, self._rows = whole or {}, rows
        self._output: Any = None  # of the model's own kind
        self.measured: FusedCausalLMOutput | None = None

    def forward(self, fused_lm_head: bool = False, **inputs: Any) -> ModelOutput:
        """The model's output, or what the fused head would have made of it."""
        if self._output is None:
            given = {key: self._whole.get(key, value) for key, value in inputs.items()}
            with late_logits_wanted(self._late and fused_lm_head):
                self._output = self._call(**{k: v for k, v in given.items() if k not in ("labels", "shift_labels")})
        if fused_lm_head:
            logits = self._output.logits if self._rows is None else self._output.logits[self._rows]
            with self._scope():
                self.measured = fused_output(logits, inputs, self._fields)
            return self.measured
        if torch.is_grad_enabled():
            return self._output
        with self._scope():  # TRL's second forward has no graph
            found = {key: _made(value) for key, value in self._output.items()}
        return type(self._output)(**found)


def _made(value: Any) -> Any:
    """A tensor without its graph, which exists."""
    if isinstance(value, LateLogits):
        value = value.made()
    return value.detach() if isinstance(value, torch.Tensor) else value


def fused_output(logits: torch.Tensor, inputs: dict[str, Any], fields: Collection[str] = ()) -> FusedCausalLMOutput:
    """Log-probabilities of the labels, and what TRL's metrics need, of logits.

    Args:
        logits: [batch, time, vocabulary].
        inputs: with `labels` or `shift_labels`.
        fields: of the output, besides `log_probs` and `label_mask`.
    """
    labels = inputs.get("shift_labels")
    if labels is None:
        logits, labels = logits[:, :-1], inputs["labels"][:, 1:]
    labels = labels.to(logits.device)
    mask = labels != -100
    if isinstance(logits, LateLogits):
        return FusedCausalLMOutput(label_mask=mask, **_of_late(logits, labels, mask, fields))
    every = torch.log_softmax(logits.float(), -1)
    chosen = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0)
    with torch.no_grad():
        found = {name: FIELDS[name](logits, every, labels).masked_fill(~mask, 0) for name in fields}
    return FusedCausalLMOutput(log_probs=chosen, label_mask=mask, **found)


FIELDS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "entropy": lambda logits, every, labels: -(every.exp() * every).sum(-1),
    "is_top1": lambda logits, every, labels: every.argmax(-1) == labels,
    "mean_logits": lambda logits, every, labels: logits.float().mean(-1),
    "log_sum_sq_probs": lambda logits, every, labels: torch.logsumexp(2 * every, -1),
}
"""Of each token, by logits, all log-probabilities, and labels."""


def _of_late(
    logits: LateLogits, labels: torch.Tensor, mask: torch.Tensor, fields: Collection[str]
) -> dict[str, torch.Tensor]:
    """The same by TRL's own function, in tiles, of the tokens that count."""
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    vocabulary = logits.weight.shape[0]
    given = logits.hidden[mask], logits.weight, logits.bias, labels[mask]
    found = ChunkedLogProbFunction.apply(*given, 1.0, min(TILE, vocabulary), None, 1.0, tuple(fields))
    return {
        name: values.new_zeros(mask.shape).masked_scatter(mask, values)
        for name, values in zip(names, found, strict=True)
        if values is not None
    }
