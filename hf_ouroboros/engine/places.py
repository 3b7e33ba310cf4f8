"""Places: where a module holds its parameters, looked up once, so that forwards can use other tensors in them.

`torch.func.functional_call` does the same, and looks every place up by its name, twice in each call: for narrow models that was a
twentieth of a stage's forward, most of it with Python's lock held, which the threads of all devices share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class Places:
    """The places of some parameters of a module, whose submodules stay the same.

    Args:
        module: the module.
        names: full names of the parameters, one for each place.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]):
        self._places = []
        for name in names:
            owner, _, own = name.rpartition(".")
            self._places.append((name, module.get_submodule(owner), own))

    @contextmanager
    def holding(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Within this context the module computes with other tensors, which are no Parameters.

        Args:
            tensors: one for each of the names.
        """
        before = [owner._parameters[own] for _, owner, own in self._places]
        try:
            for name, owner, own in self._places:
                owner._parameters[own] = tensors[name]  # type: ignore[assignment]  # as functional_call does
            yield
        finally:
            for (_, owner, own), parameter in zip(self._places, before, strict=True):
                if own in owner._parameters:
                    owner._parameters[own] = parameter
                else:  # the forward has made it a plain attribute, as PEFT does where an adapter adds to a parameter
                    setattr(owner, own, parameter)
