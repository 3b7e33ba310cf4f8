"""What a forward leaves behind in its modules: a stage has copies of modules, so nobody finds it in those of the model."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..partition import Stage
from .reads import has_script_in


class KeptState:
    """Refuses, after the first forward, attributes that a script's code has set there for its loss to read.

    Args:
        stage: whose modules.
        is_read: whether there is a loss of the script's that could look for them.
    """

    def __init__(self, stage: Stage, is_read: bool):
        parts = stage.named_modules() if is_read else ()
        self._parts = [(name, part) for name, part in parts if part is not stage and has_script_in(part)]
        self._before = {name: dict(vars(part)) for name, part in self._parts}

    def forward(self) -> None:
        """To be called after a forward.

        Raises:
            UnsupportedModelError: it has left something behind.
        """
        for name, part in self._parts:
            for attribute, value in vars(part).items():
                if _is_value(value) and value is not self._before[name].get(attribute):
                    raise UnsupportedModelError(
                        f"the forward of {name} leaves {attribute} behind as an attribute, but stages compute with copies of modules, "
                        "so that the loss would not find it in the model's; let a hook keep it in an object of its own, or let "
                        "the model return it"
                    )
        self._parts = []


def _is_value(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, float, int, list, dict)) and not isinstance(value, bool)
