"""The reference of preference losses: what the stages themselves compute before they are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from trl.trainer.utils import FusedCausalLMOutput

from .fused_head import fused_output

if TYPE_CHECKING:
    from .ticks import TickHooks


class ReferenceModel(nn.Module):
    """Stands in for the reference model of one of TRL's trainers, without weights of its own.

    Args:
        trainer: whose stages compute.
        without_adapters: whether the reference is the model below the adapters.
    """

    def __init__(self, trainer: TickHooks, without_adapters: bool):
        super().__init__()
        self._trainer = (trainer,)  # in a tuple: it is no part of this module
        self.without_adapters = without_adapters

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self._trainer[0]._partition.model.config

    @torch.no_grad()
    def forward(self, labels: torch.Tensor, fused_lm_head: bool = True, **inputs: Any) -> FusedCausalLMOutput:
        """Log-probabilities of the labels, in all processes."""
        trainer = self._trainer[0]
        staged, partition = trainer._staged, trainer._partition
        log_probs = None
        was_training = staged.training
        staged.eval()
        try:
            with adapters_off(partition.stages, self.without_adapters):
                if partition.has_last_stage:
                    log_probs = fused_output(staged(**inputs).logits, {"labels": labels}).log_probs
                else:
                    staged.pass_on(inputs)
        finally:
            staged.train(was_training)
        if not trainer._processes.alone:
            log_probs = trainer._processes.from_last_stage(None if log_probs is None else log_probs.cpu())
        assert log_probs is not None  # the process of the last stage has them
        return FusedCausalLMOutput(log_probs=log_probs.to(labels.device))


@contextmanager
def adapters_off(stages: Iterable[nn.Module], off: bool) -> Iterator[None]:
    """Within this context stages compute what they would without adapters; the model itself stays as it is.

    PEFT's own way, `disable_adapter`, would switch off the training of their parameters as well.
    """
    switched: list[Any] = [  # layers of PEFT
        module
        for stage in stages
        if off
        for module in stage.modules()
        if getattr(module, "_disable_adapters", None) is False
    ]
    for module in switched:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in switched:
            module._disable_adapters = False
