"""Weights in autocast's precision: one copy per weight version, instead of one per micro-batch in flight.

Autocast converts a layer's weights in every forward, and the graph of that forward keeps what came of it until its backward. All
forwards of a weight version convert the same values, so they can share one copy. It is a node of each of their graphs, whose backward
converts gradients back as autocast's own does, so that the numbers stay what they are.

A weight that is used in no other way has no older versions in full precision: its leaf gives its memory back as soon as there is the
copy, and the optimizer steps the parameter where it is. A frozen weight has one version, hence one copy, for as long as nobody else
may have written (`weights.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..partition.multiplied import multiplied

_YOUNGEST = 2**63 - 1


class ComputeCopies:
    """Which weights of a stage are used in autocast's precision.

    Args:
        stage: none of whose code is a script's.
        bindings: (place in the stage, name of the parameter) of all its parameters.
        dtype: autocast's.
    """

    def __init__(self, stage: nn.Module, bindings: Sequence[tuple[str, str]], dtype: torch.dtype):
        self._stage, self._bindings, self._dtype = stage, bindings, dtype
        self._places: list[tuple[str, str]] = []
        self.proven = False
        """Whether a forward with copies was seen to give what autocast gives."""
        self.look_again()

    def look_again(self) -> None:
        """Adapters may have been merged, or taken out again."""
        found = multiplied(self._stage)
        places = [(place, source) for place, source in self._bindings if place in found]
        self.proven &= places == self._places
        self._places = places
        self._sources = {s for _, s in places} - {s for place, s in self._bindings if place not in found}

    def of(self, leaves: Mapping[str, torch.Tensor], copies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is put into the stage's places instead of the leaves.

        Args:
            leaves: of a weight version, by the parameter's name.
            copies: those of this version that have been made; the others are added.
        """
        for _, source in self._places:
            if source not in copies and leaves[source].dtype == torch.float32:
                copies[source] = _hastened(leaves[source].to(self._dtype))
        return {place: copies[source] for place, source in self._places if source in copies}

    def standing_in(self, copies: Mapping[str, torch.Tensor]) -> set[str]:
        """Names of the parameters whose leaves nobody reads any more, as all that uses them has a copy."""
        return self._sources & copies.keys()


def _hastened(copy: torch.Tensor) -> torch.Tensor:
    """Lets backwards convert the gradient of a copy as soon as it is there.

    Of what could be done, autograd does the youngest first, and a copy is older than all that uses it. So the gradients of all
    copies would wait for the end, in lower precision, beside those in full precision. What is computed stays the same.
    """
    set_age = getattr(copy.grad_fn, "_set_sequence_nr", None)  # torch's own, without which it takes more memory
    if set_age is not None:
        set_age(_YOUNGEST)
    return copy
