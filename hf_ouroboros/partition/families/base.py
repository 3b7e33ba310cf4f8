"""Family: what the splitter has to know about a kind of model, with the answers of an ordinary decoder as defaults."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import UnsupportedOptionError
from ..ownership import named_parts
from ..packed import sizes
from ..stages import Stage
from ..units import StageSpan, Unit

Model = TypeVar("Model", bound=PreTrainedModel)
Config = TypeVar("Config", bound=PretrainedConfig)


class Family(ABC, Generic[Model, Config]):
    """One kind of model, of a class and a configuration. It has no state; a new kind is one file with one class, listed in `FAMILIES`.

    Attributes:
        computes_loss: whether calling the model with labels gives the loss without logits.
        draws_in_turn: whether all stages, one after the other, draw the random numbers that the unsplit model draws.
    """

    computes_loss: bool = False
    draws_in_turn: bool = True

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Whether this family knows the model."""

    @abstractmethod
    def check(self, model: Model) -> None:
        """Raises UnsupportedModelError for features of this model that stages can't reproduce."""

    @abstractmethod
    def embedding(self, model: Model) -> tuple[str, ...]:
        """Names of the modules that turn token ids into the first hidden state."""

    @abstractmethod
    def layers(self, model: Model) -> list[str]:
        """Names of the layers in execution order."""

    def beside(self, model: Model, layer: int) -> tuple[str, ...]:
        """Names of the modules that stay with a layer."""
        return ()

    @abstractmethod
    def head(self, model: Model) -> list[tuple[str, ...]]:
        """Names of the modules after the layers, in execution order; those of a tuple stay together."""

    @abstractmethod
    def make_stage(self, model: Model, units: Sequence[Unit], span: StageSpan, num_stages: int) -> Stage:
        """One stage of a model, which may be on the meta device."""

    def cost(self, model: Model, name: str) -> float | None:
        """Multiply-adds per token of a module; None: as many as its matrices have elements."""
        return None

    def remembers(self, config: Config) -> bool:
        """Whether layers remember a segment while they read the next one."""
        return False

    def evaluation_config(self, config: Config, **options: int) -> Config:
        """A copy of the configuration with `mem_len`, `clamp_len` as evaluation wants them.

        Raises:
            UnsupportedOptionError: the architecture has no such thing.
        """
        given = ", ".join(f"eval_{name}={value}" for name, value in options.items())
        raise UnsupportedOptionError(
            f"{given}: a {config.model_type} model has no memory that carries over from segment to segment; leave it out "
            "(models that do: Transformer-XL)"
        )

    def units(self, model: Model) -> list[Unit]:
        """The model's units in execution order, with cost (multiply-adds per token) and bytes."""
        seen: set[int] = set()
        real = sizes(model.parameters(), model)

        def unit(modules: Iterable[str], kind: str) -> Unit:
            modules = tuple(modules)
            parameters = [p for name in modules for _, p in named_parts(model, name)]
            fresh = [p for p in parameters if id(p) not in seen]
            seen.update(id(p) for p in parameters)
            # An embedding is looked up, not multiplied: it costs next to nothing beside a layer.
            known = self.cost(model, modules[0])
            counted = sum(real[id(p)].elements for p in parameters if p.dim() > 1) if kind != "embedding" else 0
            cost = counted if known is None else known
            return Unit(modules, kind, float(cost), sum(real[id(p)].bytes for p in fresh))

        embedding = unit(self.embedding(model), "embedding")
        layers = [unit([name, *self.beside(model, i)], "layer") for i, name in enumerate(self.layers(model))]
        return [embedding, *layers, *(unit(names, "head") for names in self.head(model))]
