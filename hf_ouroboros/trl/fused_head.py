"""What TRL's losses ask of a model, `model(..., fused_lm_head=True)`, from a model's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput
from trl.trainer.utils import FusedCausalLMOutput


class FusedHead(nn.Module):
    """Stands in for a model with TRL's fused head; the model is run once, however often this is called.

    Args:
        call: gives the model's output, with logits, for inputs without labels.
    """

    def __init__(self, call: Callable[..., ModelOutput]):
        super().__init__()
        self._call = call
        self._output: ModelOutput | None = None

    def forward(self, fused_lm_head: bool = False, **inputs: Any) -> ModelOutput:
        """The model's output, or what the fused head would have made of it."""
        if self._output is None:
            given = {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")}
            self._output = self._call(**given)
        return fused_output(self._output.logits, inputs) if fused_lm_head else self._output


def fused_output(logits: torch.Tensor, inputs: dict[str, Any]) -> FusedCausalLMOutput:
    """Log-probabilities of the labels, and what TRL's metrics need, of logits [batch, time, vocabulary]."""
    labels = inputs.get("shift_labels")
    if labels is None:
        logits, labels = logits[:, :-1], inputs["labels"][:, 1:]
    labels = labels.to(logits.device)
    mask = labels != -100
    every = torch.log_softmax(logits.float(), -1)
    chosen = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0)
    with torch.no_grad():
        entropy = -(every.exp() * every).sum(-1).masked_fill(~mask, 0)
        is_top1 = (every.argmax(-1) == labels) & mask
    return FusedCausalLMOutput(log_probs=chosen, entropy=entropy, is_top1=is_top1, label_mask=mask)
