"""Anatomy of an architecture: what crosses the boundaries of its layers and which modules come before and after them.

    boundaries of a model with two layers, by what is there

        ids -> [embedding] --(0)--> [layer 0] --(1)--> [layer 1] --(2)--> [norm] --(3)--> [head] -> logits

The state at boundary b < L is the input of layer b; at L it is the output of the last layer; at L + 1 the input of the
output embedding, where that is all that the logits depend on. `dissection.py` finds it out.

The layers of an encoder-decoder model are those of its encoder and then those of its decoder. What the decoder's first layer
gets comes from the embeddings; up to there it crosses boundaries beside the encoder's hidden state, and from there on the
encoder's output crosses them beside the decoder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .shadow import Path

HIDDEN = "hidden"


@dataclass(frozen=True)
class Extra:
    """A tensor besides the hidden state that layers receive and that depends on parameters or earlier layers.

    Args:
        name: by which it crosses boundaries.
        level: how many layers have run when it is there.
        trained: whether a gradient flows back through it.
    """

    name: str
    level: int
    trained: bool


@dataclass(frozen=True)
class LayerCall:
    """How a layer is called and what it returns.

    Args:
        hidden: place of the hidden state in (args, kwargs); it is among the extras, too, where it is not what the layer before
            puts out.
        extras: {place in (args, kwargs): what is there}.
        length: how many values it returns as a tuple; None where it returns the hidden state alone.
        slot: which of them is the hidden state.
    """

    hidden: Path
    extras: Mapping[Path, Extra] = field(default_factory=dict)
    length: int | None = None
    slot: int = 0

    def hidden_of(self, output: Any) -> torch.Tensor:
        """The hidden state in what the layer returned."""
        return output if self.length is None else output[self.slot]

    def returning(self, hidden: torch.Tensor) -> Any:
        """What the layer would return with this hidden state, and nothing else."""
        if self.length is None:
            return hidden
        return tuple(hidden if i == self.slot else None for i in range(self.length))


@dataclass(frozen=True)
class Anatomy:
    """What stages have to know about an architecture.

    Args:
        stacks: names of the lists of layers: one, or an encoder's and a decoder's.
        layers: names of the layers, in the order in which they run.
        calls: how every layer is called.
        embedding: names of the modules before the layers (and of those with parameters that nobody uses); parameters of
            modules that hold the layers, too, are named by themselves, here and below.
        norms: names of the modules between the layers and the head.
        head: names of the modules from the output embedding on, or of all modules after the layers.
        bridge: names of the modules with parameters between the stacks, which stay with the last layer of the first one.
        head_input: place of the hidden state in the arguments of `head[0]`, if a stage may begin there; else None.
        early_dropouts: names of the dropout modules that run before the layers.
        draws: whether a forward in training mode draws random numbers.
    """

    stacks: tuple[str, ...]
    layers: tuple[str, ...]
    calls: tuple[LayerCall, ...]
    embedding: tuple[str, ...]
    bridge: tuple[str, ...]
    norms: tuple[str, ...]
    head: tuple[str, ...]
    head_input: Path | None
    early_dropouts: tuple[str, ...]
    draws: bool

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.calls)

    def beside(self, i: int) -> tuple[str, ...]:
        """Names of the modules that stay with a layer."""
        last = len(self.stacks) > 1 and i + 1 < self.num_layers and self.calls[i + 1].hidden in self.calls[i + 1].extras
        return self.bridge if last else ()

    def hidden_from(self, boundary: int) -> str | None:
        """The name by which the hidden state at a boundary has crossed the boundaries before it; None: a layer makes it."""
        if boundary >= self.num_layers:
            return None
        call = self.calls[boundary]
        return call.extras[call.hidden].name if call.hidden in call.extras else None

    def carried(self, boundary: int) -> dict[str, list[tuple[int, Path]]]:
        """What crosses a boundary besides the hidden state: name -> (layer, place) of all who get it later."""
        found: dict[str, list[tuple[int, Path]]] = {}
        for i in range(boundary, self.num_layers):
            for path, extra in self.calls[i].extras.items():
                if extra.level <= boundary and not (i == boundary and path == self.calls[i].hidden):
                    found.setdefault(extra.name, []).append((i, path))
        return found

    def level(self, name: str) -> int:
        """How many layers have run when what crosses boundaries by this name, besides the hidden state, is there."""
        return next(e.level for call in self.calls for e in call.extras.values() if e.name == name)

    def trained(self, name: str) -> bool:
        """Whether a gradient flows back through what crosses boundaries by this name."""
        return name == HIDDEN or any(e.name == name and e.trained for call in self.calls for e in call.extras.values())
