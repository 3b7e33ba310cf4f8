"""Architecture families: the little that the splitter has to know about each kind of model."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import UnsupportedModelError
from .gpt2 import GPT2Family
from .transfo_xl import TransfoXLFamily

Memory = dict[str, torch.Tensor]
"""What the layers of a stage remember of a segment, by names that the family gives; [rows of the batch, ...] each."""

Targets = dict[str, Any]
"""What a head computes the loss from: keyword arguments of its forward (labels, by what to divide)."""


class Family(Protocol):
    """What a family tells the splitter; one small class per architecture, without state.

    Attributes:
        model_class: the architecture.
        batch_keys: what stages compute with; everything else in a batch is for the loss or for nobody.
        computes_loss: whether the head can compute the loss without logits (then there is `loss`).
    """

    model_class: type[PreTrainedModel]
    batch_keys: frozenset[str]
    computes_loss: bool

    def check(self, model: PreTrainedModel) -> None:
        """Raises UnsupportedModelError for features of this model that stages can't reproduce."""

    def embedding(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Names of the modules that turn token ids into the first hidden state."""

    def layers(self, model: PreTrainedModel) -> list[str]:
        """Names of the layers in execution order."""

    def head(self, model: PreTrainedModel) -> list[str]:
        """Names of the modules after the layers, in execution order; the last one gives the logits."""

    def cost(self, model: PreTrainedModel, name: str) -> float | None:
        """Multiply-adds per token of a module; None: as many as its matrices have elements."""

    def embed(self, stage: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """First hidden state, [batch, time, width]."""

    def run_layers(
        self, stage: nn.Module, hidden: torch.Tensor, batch: dict[str, torch.Tensor], memory: Memory | None
    ) -> torch.Tensor:
        """Hidden state after `stage.layers`; `memory` as in `Stage.forward`."""

    def loss(self, stage: nn.Module, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The head's own loss, a scalar, where `computes_loss`."""

    def remembers(self, config: PretrainedConfig) -> bool:
        """Whether layers remember a segment while they read the next one."""

    def evaluation_config(self, config: PretrainedConfig, **options: int) -> PretrainedConfig:
        """A copy of the configuration with `mem_len`, `clamp_len` as evaluation wants them.

        Raises:
            UnsupportedOptionError: the architecture has no such thing.
        """


FAMILIES: tuple[Family, ...] = (GPT2Family(), TransfoXLFamily())


def find_family(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: no family knows this architecture; the message lists those that are known.
    """
    for family in FAMILIES:
        if isinstance(model, family.model_class):
            if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                raise UnsupportedModelError(
                    "the model has gradient checkpointing enabled, which would recompute with the weights of now; call "
                    "model.gradient_checkpointing_disable() and use OuroborosArguments(recompute=True)"
                )
            family.check(model)
            return family
    known = ", ".join(family.model_class.__name__ for family in FAMILIES)
    raise UnsupportedModelError(f"{type(model).__name__} can't be split into stages; supported architectures: {known}")
