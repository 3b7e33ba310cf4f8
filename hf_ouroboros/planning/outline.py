"""Units of any causal language model that is a row of layers, also of architectures that can't be trained here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..partition.experts import active_cost
from ..partition.families import Family, find_family
from ..partition.split import tied_parameter_names
from ..partition.stages import Stage
from ..partition.units import StageSpan, Unit


@dataclass(frozen=True)
class Outline:
    """A model as the planner sees it.

    Args:
        units: its parts in execution order.
        tied_names: full names of the matrices that embedding and head share.
        reason: why it can be planned but not trained here; None where it can be trained.
    """

    units: tuple[Unit, ...]
    tied_names: tuple[str, ...]
    reason: str | None


class LayerList(Family):
    """What a family tells about names, read off the model: its longest list of modules, in no other list, holds the layers."""

    def accepts(self, model: nn.Module) -> bool:
        """Nothing: it can only plan."""
        return False

    def check(self, model: PreTrainedModel) -> None:
        """Nothing: what it refuses, it refuses when it is made."""

    def make_stage(self, model: PreTrainedModel, units: Sequence[Unit], span: StageSpan, num_stages: int) -> Stage:
        """Refuses."""
        raise UnsupportedModelError(f"{type(model).__name__} can be planned, but not split into stages")

    def __init__(self, model: PreTrainedModel):
        lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        lists = [item for item in lists if not any(item[0].startswith(f"{name}.") for name, _ in lists)]
        head = model.get_output_embeddings()
        if not lists or head is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no list of layers or no output embedding, so it can't be planned; use a "
                "causal language model that is a row of layers"
            )
        self._name, self._list = max(lists, key=lambda item: len(item[1]))
        parent = model.get_submodule(self._name.rpartition(".")[0])
        prefix = self._name.rpartition(".")[0]
        self._before: list[str] = []
        self._after: list[str] = []
        inputs = model.get_input_embeddings()
        for child_name, child in parent.named_children():
            if child is self._list:
                continue
            name = f"{prefix}.{child_name}" if prefix else child_name
            # What has no weights (rotary positions, dropout) goes with the embeddings; a norm ends the row.
            first = child is inputs or "embed" in child_name or not any(True for _ in child.parameters())
            (self._before if first else self._after).append(name)
        names = {id(module): name for name, module in model.named_modules()}
        if not any(model.get_submodule(name) is inputs for name in self._before):
            self._before.insert(0, names[id(inputs)])
        self._after.append(names[id(head)])

    def embedding(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Names of the modules before the layers."""
        return tuple(self._before)

    def layers(self, model: PreTrainedModel) -> list[str]:
        """Names of the layers."""
        return [f"{self._name}.{i}" for i in range(len(self._list))]

    def head(self, model: PreTrainedModel) -> list[tuple[str, ...]]:
        """Names of the modules after the layers."""
        return [(name,) for name in self._after]

    def cost(self, model: PreTrainedModel, name: str) -> float | None:
        """As of a model that can be split."""
        return active_cost(model.get_submodule(name), model.config)


def outline(model: PreTrainedModel) -> Outline:
    """The units of a model, which may be on the meta device.

    Raises:
        UnsupportedModelError: it is no row of layers.
    """
    try:
        family, reason = find_family(model), None
    except UnsupportedModelError as error:
        family, reason = LayerList(model), str(error)
    units = family.units(model)
    return Outline(tuple(units), tied_parameter_names(model, units), reason)
