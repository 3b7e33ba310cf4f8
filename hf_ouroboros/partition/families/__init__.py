"""Architecture families: what the splitter has to know about each kind of model."""

from __future__ import annotations

import re
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from .base import Family
from .decoder import DecoderFamily
from .encoder_decoder import EncoderDecoderFamily
from .transfo_xl import TransfoXLFamily

__all__ = ["FAMILIES", "Family", "find_family"]

FAMILIES: tuple[Family, ...] = (TransfoXLFamily(), EncoderDecoderFamily(), DecoderFamily())
"""The first that accepts a model is its family."""
NO_LANGUAGE_MODEL = r"(For(Sequence|Token|Image|Audio)Classification|ForQuestionAnswering|ForMultipleChoice)$"
"""Names of classes whose head is another one."""


def find_family(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: the model can't be split into stages; the message says why.
    """
    family = next((family for family in FAMILIES if family.accepts(model)), None)
    if family is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} can't be split into stages: it is no Transformers model (a PreTrainedModel)"
        )
    if re.search(NO_LANGUAGE_MODEL, type(model).__name__):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no language model: its head gives classes, or one number (a reward), and no logits of "
            "tokens; train it with stock Trainer, or TRL's RewardTrainer, or take the causal language model of its kind"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UnsupportedModelError(
            "the model has gradient checkpointing enabled, which would recompute with the weights of now; call "
            "model.gradient_checkpointing_disable() and use OuroborosArguments(recompute=True)"
        )
    family.check(cast(PreTrainedModel, model))  # which its family accepts
    return family
