"""Changes after construction: a model, or options, that are others than when the stages were made make new stages."""

from __future__ import annotations

from typing import Any

from ..adapters import base_of
from ..errors import UnsupportedOptionError
from .interfaces import SplitTrainer
from .structure import Structure


class ChangeHooks(SplitTrainer):
    """Remembers of what the stages were made, and makes new ones at `train()`, `evaluate()` and `predict()` if it changed."""

    _made_of: tuple[Structure, dict[str, Any]] | None = None

    def _remember_model(self) -> None:
        """From now on, what is changed is a change."""
        self._made_of = Structure.of(self.model), self._options_of_split()

    def _options_of_split(self) -> dict[str, Any]:
        options = self.options
        names = ("device_names", "device_map", "num_stages", "max_memory", "schedule")
        return {name: getattr(options, name) for name in names} | {"bf16": options.bf16, "fp16": options.fp16}

    def _split_if_changed(self) -> None:
        """Makes new stages if the model, or what decides about the split, is not what it was.

        Raises:
            UnsupportedOptionError: it changed where each process has kept the weights of its own stages only.
        """
        if self._partition.model is base_of(self.model):
            change = self._change()
            if change is None:
                return
            if not self._processes.alone:
                raise UnsupportedOptionError(
                    f"{change} was changed after the trainer was made, but the model can't be split again: each of the "
                    f"{self._processes.world_size} processes has only the weights of its own stages; change it before"
                )
        self._split(self.model, self.options)
        self._remember_model()

    def _change(self) -> str | None:
        if self._made_of is None:
            return None
        structure, options = self._made_of
        now = Structure.of(self.model)
        if change := now.change_since(structure):
            return change
        for name, attribute, _ in now.settings_since(structure):
            return f"{name}.{attribute}" if name else attribute
        return next((name for name, value in self._options_of_split().items() if value != options[name]), None)
