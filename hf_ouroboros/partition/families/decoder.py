"""Any causal language model that is a row of layers: a stage runs the model's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import UnsupportedModelError
from ..dissection import find_anatomy, unchanged
from ..experts import active_cost
from ..shadow_stage import ShadowStage
from ..stages import Stage
from ..units import StageSpan, Unit
from .base import Family


class DecoderFamily(Family[PreTrainedModel, PretrainedConfig]):
    """Reads off the model, by its anatomy, what there is to know."""

    def accepts(self, model: nn.Module) -> bool:
        """Every Transformers model; `check` has the reasons why not."""
        return isinstance(model, PreTrainedModel)

    def check(self, model: PreTrainedModel) -> None:
        """Refuses what its anatomy refuses, and what would be another function in every forward."""
        config = model.config
        for module in (config, *model.modules()):
            rate = getattr(module, "layerdrop", 0.0)
            if isinstance(rate, float) and rate > 0:
                raise UnsupportedModelError(
                    f"layerdrop={rate}: layers that are skipped at random can't be split into stages; set layerdrop to 0"
                )
        if "dynamic" in _rope_types(getattr(config, "rope_parameters", None)):
            raise UnsupportedModelError(
                "rope_type='dynamic': rotary frequencies that depend on the longest batch so far would be others at the "
                "moment of a backward; train with rope_type 'linear', 'yarn' or 'llama3'"
            )
        find_anatomy(model)

    def units(self, model: PreTrainedModel) -> list[Unit]:
        """The model's units in execution order, with cost (multiply-adds per token) and bytes."""
        with unchanged(model):
            return super().units(model)

    def embedding(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Names of the embedding modules."""
        return find_anatomy(model).embedding

    def layers(self, model: PreTrainedModel) -> list[str]:
        """Names of the layers, of an encoder before those of its decoder."""
        return list(find_anatomy(model).layers)

    def beside(self, model: PreTrainedModel, layer: int) -> tuple[str, ...]:
        """What an encoder ends with stays with its last layer."""
        return find_anatomy(model).beside(layer)

    def head(self, model: PreTrainedModel) -> list[tuple[str, ...]]:
        """Final norm and output projection."""
        anatomy = find_anatomy(model)
        return [names for names in (anatomy.norms, anatomy.head) if names]

    def cost(self, model: PreTrainedModel, name: str) -> float | None:
        """Of a layer with experts: a token passes only some of them."""
        return active_cost(model.get_submodule(name), model.config)

    def make_stage(self, model: PreTrainedModel, units: Sequence[Unit], span: StageSpan, num_stages: int) -> Stage:
        """A stage that is a shadow of the model."""
        return ShadowStage(model, self, find_anatomy(model), units, span, num_stages)


def _rope_types(parameters: Any) -> set[str]:
    """The kinds of rotary positions in a configuration, which may have one for every kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    found = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return found.union(*(_rope_types(value) for value in parameters.values()))
