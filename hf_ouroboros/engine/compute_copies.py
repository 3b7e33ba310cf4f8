"""Weights in autocast's precision: one copy per weight version, instead of one per micro-batch in flight.

Autocast converts a layer's weights in every forward, and the graph of that forward keeps what came of it until its backward. All
forwards of a weight version convert the same values, so they can share one copy. It is a node of each of their graphs, whose backward
converts gradients back as autocast's own does, so that the numbers stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_MULTIPLYING = (nn.Linear, Conv1D)
"""Modules that only multiply by their weights, which is what autocast does in its lower precision."""

_LOOKING = ("peft",)
"""Libraries whose layers ask weights for their precision, and compute otherwise where it is another one."""


class ComputeCopies:
    """Which weights of a stage are used in autocast's precision.

    Args:
        stage: none of whose code is a script's.
        bindings: (place in the stage, name of the parameter) of all its parameters.
        dtype: autocast's.
    """

    def __init__(self, stage: nn.Module, bindings: Sequence[tuple[str, str]], dtype: torch.dtype):
        self._dtype = dtype
        modules = dict(stage.named_modules())
        looked_at = [f"{name}." for name, part in modules.items() if type(part).__module__.split(".")[0] in _LOOKING]
        self._places = [
            (place, source)
            for place, source in bindings
            if type(modules[place.rpartition(".")[0]]) in _MULTIPLYING and not place.startswith(tuple(looked_at))
        ]
        self.proven = False
        """Whether a forward with copies was seen to give what autocast gives."""

    def of(self, leaves: Mapping[str, torch.Tensor], copies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is put into the stage's places instead of the leaves.

        Args:
            leaves: of a weight version, by the parameter's name.
            copies: those of this version that have been made; the others are added.
        """
        for _, source in self._places:
            if source not in copies and leaves[source].dtype == torch.float32:
                copies[source] = leaves[source].to(self._dtype)
        return {place: copies[source] for place, source in self._places if source in copies}
