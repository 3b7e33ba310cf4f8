"""Stage: a run of a model's units with the very same parameters under the very same names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from ..errors import UnsupportedModelError
from . import packed
from .packed_tensors import is_own_kind
from .units import StageSpan, Unit

if TYPE_CHECKING:
    from .compiled import Compilation
    from .families import Family

Boundary = dict[str, torch.Tensor]
"""What crosses from a stage to the next: the hidden state, by the name `HIDDEN`, and what else later layers get."""

Memory = dict[str, torch.Tensor]
"""What the layers of a stage remember of a segment, by names that the family gives; [rows of the batch, ...] each."""

ModelCall = Callable[..., ModelOutput]
"""The model as the last stage can call it: with a batch's inputs, labels and what else its forward takes, by name."""

Finish = Callable[[ModelCall], Any]
"""What is done with the model on the last stage: calls it, and returns what the stage is to return."""


class Stage(nn.Module, ABC):
    """A contiguous run of units of a model, as a module of its own.

    Args:
        config: the model's configuration.
        family: what the splitter knows about this architecture.
        units: all units of the model.
        span: which of them belong to this stage.
        num_stages: K.

    Attributes:
        batch_keys: what of a batch the stage computes with.
        draws: whether its forward in training mode draws random numbers.
        first_trained: the first unit of the model with a trained parameter.
        compiles: whether its layers run compiled.
    """

    batch_keys: frozenset[str]
    draws: bool
    first_trained: int = 0
    compiles: bool = False

    def __init__(
        self, config: PretrainedConfig, family: Family, units: Sequence[Unit], span: StageSpan, num_stages: int
    ):
        super().__init__()
        own = units[span.start : span.stop]
        self.index = span.index
        self.start = span.start
        self.units = tuple(units)
        self.is_first = span.index == 0
        self.is_last = span.index == num_stages - 1
        self.family = family
        self.config = config
        self.layer_names = [unit.modules[0] for unit in own if unit.kind == "layer"]
        self.head_names = [name for unit in own if unit.kind == "head" for name in unit.modules]

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The stage's layers by name, in execution order."""
        return {name: self.get_submodule(name) for name in self.layer_names}

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    def trains(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a gradient flows back through what crosses a boundary by this name."""
        return tensor.is_floating_point() and self.first_trained < self.start

    def check_config(self) -> None:
        """Raises UnsupportedModelError if the configuration, by now, asks for what stages can't give."""

    def completes(self, unit: int) -> bool:
        """Whether modules that hold units up to this one run to their end in this stage, with what they really put out."""
        return False

    @abstractmethod
    def forward(
        self,
        batch: dict[str, torch.Tensor],
        received: Boundary | None = None,
        memory: Memory | None = None,
        finish: Finish | None = None,
    ) -> Boundary | Any:
        """Runs the stage's units.

        Args:
            batch: the micro-batch: `input_ids` [batch, time] and what the model takes besides (masks, positions).
            received: output of the stage before; None on the first stage.
            memory: what the stage's layers remember of the segment before, empty at the beginning of a text; is
                overwritten with what they remember of this one, by new tensors. None: nothing is remembered.
            finish: on the last stage, what is done with the model; None to have its logits.

        Returns:
            What the next stage receives; on the last stage what `finish` returns, or the logits
            [batch, time, vocabulary].
        """

    def compile_layers(self, compilation: Compilation) -> None:
        """Lets the layers run compiled from now on.

        Raises:
            UnsupportedModelError: they can't.
        """
        raise UnsupportedModelError(
            f"torch_compile compiles the layers of stages that run the model's own forward, which those of a "
            f"{self.config.model_type} don't; leave it off"
        )

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Within this context its layers run as they are, so that whoever watches them sees what they do."""
        before, self.compiles = self.compiles, False
        try:
            yield
        finally:
            self.compiles = before

    def place(self, device: torch.device) -> None:
        """Moves the stage's parameters and buffers to a device."""
        for parameter in self.parameters():
            if parameter.device != device and not is_own_kind(parameter):
                parameter.data = parameter.data.to(device)
        packed.place(self, device)
        for module in self.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != device:
                    module._buffers[name] = buffer.to(device)


def to_device(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors among the values moved to a device, everything else as it is."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in values.items()}


def select(stage: Stage, batch: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """The part of a batch that a stage computes with, on a device."""
    return {
        key: batch[key].to(device, non_blocking=True)
        for key in batch
        if key in stage.batch_keys and batch[key] is not None
    }


def compose(
    stages: Sequence[Stage],
    batch: dict[str, torch.Tensor],
    memories: Sequence[Memory | None] | None = None,
    finish: Finish | None = None,
) -> Any:
    """Runs all stages in turn, as the unsplit model would, moving the batch and hidden state along.

    Args:
        stages: all of them, with weights.
        batch: what the model takes, e.g. `input_ids` [batch, time].
        memories: of each stage, as in `Stage.forward`; None for no memory.
        finish: as in `Stage.forward`.

    Returns:
        What `finish` returns, or the logits [batch, time, vocabulary] on the last stage's device.
    """
    state: Any = None
    for stage, memory in zip(stages, memories or [None] * len(stages), strict=True):
        device = stage.device
        given = None if state is None else to_device(state, device)
        state = stage(select(stage, batch, device), given, memory, finish if stage.is_last else None)
    return state
