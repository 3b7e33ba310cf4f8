"""What TRL's losses ask of a model, `model(..., fused_lm_head=True)`, from a model's logits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput
from trl.trainer.utils import FusedCausalLMOutput


class FusedHead(nn.Module):
    """Stands in for a model with TRL's fused head; the model is run once, however often this is called.

    Args:
        call: gives the model's output, with logits, for inputs without labels.
        fields: of the head's output, see `fused_output`.
    """

    def __init__(self, call: Callable[..., ModelOutput], fields: Collection[str]):
        super().__init__()
        self._call, self._fields = call, fields
        self._output: Any = None  # of the model's own kind

    def forward(self, fused_lm_head: bool = False, **inputs: Any) -> ModelOutput:
        """The model's output, or what the fused head would have made of it."""
        if self._output is None:
            given = {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")}
            self._output = self._call(**given)
        return fused_output(self._output.logits, inputs, self._fields) if fused_lm_head else self._output


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
