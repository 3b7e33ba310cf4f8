"""Architecture families: the little that the splitter has to know about each kind of model."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from .gpt2 import GPT2Family


class Family(Protocol):
    """What a family tells the splitter; one small class per architecture, without state."""

    model_class: type[PreTrainedModel]
    batch_keys: frozenset[str]

    def check(self, model: PreTrainedModel) -> None:
        """Raises UnsupportedModelError for features of this model that stages can't reproduce."""

    def embedding(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Names of the modules that turn token ids into the first hidden state."""

    def layers(self, model: PreTrainedModel) -> list[str]:
        """Names of the layers in execution order."""

    def head(self, model: PreTrainedModel) -> list[str]:
        """Names of the modules after the layers, in execution order; the last one gives the logits."""

    def embed(self, stage: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """First hidden state, [batch, time, width]."""

    def context(self, stage: nn.Module, hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict:
        """Keyword arguments that every layer of the stage gets (masks, positions)."""

    def run_layer(self, layer: nn.Module, hidden: torch.Tensor, context: dict) -> torch.Tensor:
        """Next hidden state."""


FAMILIES: tuple[Family, ...] = (GPT2Family(),)


def find_family(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: no family knows this architecture; the message lists those that are known.
    """
    for family in FAMILIES:
        if isinstance(model, family.model_class):
            family.check(model)
            return family
    known = ", ".join(family.model_class.__name__ for family in FAMILIES)
    raise UnsupportedModelError(f"{type(model).__name__} can't be split into stages; supported architectures: {known}")
