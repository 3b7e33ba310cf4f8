"""Stage: a run of a model's units with the very same parameters under the very same names."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import MethodType

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .families import Family, Memory, Targets
from .units import StageSpan, Unit


class Stage(nn.Module):
    """A contiguous run of units of a model, as a module of its own.

    Its modules are shadows of the model's: own module objects, so that neither train/eval switches nor swapped
    weights reach the model, but the same Parameter objects under the same names.

    Args:
        model: the complete model.
        family: what the splitter knows about this architecture.
        units: all units of the model.
        span: which of them belong to this stage.
        num_stages: K.
    """

    def __init__(self, model: PreTrainedModel, family: Family, units: Sequence[Unit], span: StageSpan, num_stages: int):
        super().__init__()
        own = units[span.start : span.stop]
        self.index = span.index
        self.is_first = span.index == 0
        self.is_last = span.index == num_stages - 1
        self.family = family
        self.config = model.config
        self.layer_names = [unit.modules[0] for unit in own if unit.kind == "layer"]
        self.head_names = [unit.modules[0] for unit in own if unit.kind == "head"]
        shadows: dict[int, nn.Module] = {}
        for unit in own:
            for name in unit.modules:
                _attach(self, name, _shadow(model.get_submodule(name), shadows))

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The stage's layers by name, in execution order."""
        return {name: self.get_submodule(name) for name in self.layer_names}

    def forward(
        self,
        batch: dict[str, torch.Tensor],
        hidden: torch.Tensor | None = None,
        memory: Memory | None = None,
        targets: Targets | None = None,
    ) -> torch.Tensor:
        """Runs the stage's units.

        Args:
            batch: the micro-batch: `input_ids` [batch, time] and what the family takes besides (masks, positions).
            hidden: output of the stage before, [batch, time, width]; None on the first stage.
            memory: what the stage's layers remember of the segment before, empty at the beginning of a text; is
                overwritten with what they remember of this one, by new tensors. None: nothing is remembered.
            targets: on the last stage, of a family whose head computes the loss: what it computes it from.

        Returns:
            The hidden state for the next stage; on the last one the logits [batch, time, vocabulary], or with targets
            the loss, a scalar.
        """
        if self.is_first:
            hidden = self.family.embed(self, batch)
        if self.layer_names:
            hidden = self.family.run_layers(self, hidden, batch, memory)
        if targets is not None:
            return self.family.loss(self, hidden, targets)
        for name in self.head_names:
            hidden = self.get_submodule(name)(hidden)
        return hidden


def _shadow(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """A copy of the module tree that shares parameters, buffers and hooks."""
    if id(module) not in known:
        twin = copy.copy(module)  # nn.Module copies its __dict__ shallowly
        known[id(module)] = twin
        # accelerate leaves an instance attribute `forward` behind when it removes its hooks; bound to the original,
        # it would compute with the model's weights instead of the shadow's.
        forward = twin.__dict__.get("forward")
        if getattr(forward, "__self__", None) is module:
            twin.forward = MethodType(forward.__func__, twin)
        elif forward is not None:
            raise UnsupportedModelError(
                f"the forward of a {type(module).__name__} of this model was replaced by {forward!r:.80}, which would "
                "compute with the model's weights of now; undo the replacement before the model is split"
            )
        twin._parameters = dict(module._parameters)
        twin._buffers = dict(module._buffers)
        twin._modules = {
            name: child if child is None else _shadow(child, known) for name, child in module._modules.items()
        }
    return known[id(module)]


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]
    root.add_module(leaf, module)
