"""Modules of other stages in a stage's shadow: how one forward enters the stage, passes what is not its own, and ends.

A stage begins at its entry and ends at its exit. Layers before the entry give on what they get, so that the model's own
loop reaches the stage's layers; the first module from the exit on takes what the next stages need, and ends the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .anatomy import HIDDEN, Anatomy
from .ownership import named_parts
from .shadow import Path, hollow, leaf, leaves, map_leaves, on_meta
from .stages import Boundary
from .stand_ins import identity, nothing, output_on_meta, without_values
from .units import StageSpan, Unit


class EndReached(Exception):
    """The forward has got to the end of the stage."""


class Ends:
    """Where a stage begins and ends, and what crosses there.

    Unit 0 is the embedding and unit 1 + i is layer i, so a stage that begins with unit u receives what crosses boundary u - 1.

    Attributes:
        entry: the layer with which the stage begins (the number of layers, or one more, for parts of the head); None for the
            first stage.
        exit: the first layer after the stage, likewise; None for the last stage.
        own: the stage's layers.
        relayed: what is sent on as it was received: the name under which it is sent to the name under which it came.
        wanted: from a layer to what the next stages need of its arguments, as (name, place).
        last_capture: the layer after which nothing else is to be taken.
    """

    def __init__(self, anatomy: Anatomy, span: StageSpan, is_first: bool, is_last: bool):
        self.entry = None if is_first else span.start - 1
        self.exit = None if is_last else span.stop - 1
        self.own = range(max(span.start - 1, 0), min(span.stop - 1, anatomy.num_layers))
        carried_in = {} if self.entry is None else anatomy.carried(self.entry)
        carried_out = {} if self.exit is None else anatomy.carried(self.exit)
        self.relayed = {name: name for name in carried_out if name in carried_in}
        given = None if self.exit is None else anatomy.hidden_from(self.exit)
        if given is not None and given in carried_in:
            self.relayed[HIDDEN] = given
        places = {name: found[0] for name, found in carried_out.items() if name not in carried_in}
        self.wanted: dict[int, list[tuple[str, Path]]] = {}
        for name, (layer, path) in places.items():
            self.wanted.setdefault(layer, []).append((name, path))
        self.last_capture = max([self.exit or 0, *self.wanted])


class Passage:
    """One forward on its way through a stage.

    Attributes:
        received: what came from the stage before.
        captured: what the stages after are to be sent.
        entered: whether the forward has come by the stage's entry.
        device: where tensors without values are put.
        stand_ins_have_memory: whether tensors without values can be written into.
    """

    def __init__(self) -> None:
        self.received: Boundary | None = None
        self.captured: Boundary = {}
        self.entered = False
        self.device = torch.device("cpu")
        self.stand_ins_have_memory = False

    def begin(self, received: Boundary | None, entered: bool) -> None:
        """A forward begins; `entered` says that the stage begins where the model does."""
        self.received, self.captured, self.entered = received, {}, entered

    def end(self) -> None:
        """Lets go of the forward's tensors."""
        self.received, self.captured = None, {}

    def enter(self) -> torch.Tensor:
        """The hidden state with which the stage's own layers begin."""
        self.entered = True
        return self.received_as(HIDDEN)

    def received_as(self, name: str) -> torch.Tensor:
        """What came from the stage before under a name."""
        assert self.received is not None  # only a stage with others before it has an entry
        return self.received[name]

    def stand_in(self, like: torch.Tensor) -> torch.Tensor:
        """Zeros of a tensor's shape and dtype."""
        zeros = nothing(like, self.device)
        return zeros.contiguous() if self.stand_ins_have_memory else zeros


class ForeignModules:
    """Makes what stands in a stage's shadow for modules of other stages.

    Args:
        anatomy: of the model.
        ends: of the stage.
        passage: of the stage's forwards.
    """

    def __init__(self, anatomy: Anatomy, ends: Ends, passage: Passage):
        self._anatomy, self._ends, self._passage = anatomy, ends, passage

    def replacements(
        self, model: nn.Module, units: Sequence[Unit], span: StageSpan
    ) -> dict[int, Callable[[nn.Module], nn.Module]]:
        """From the identity of a module to what makes its stand-in: foreign layers, and the largest foreign modules beside them."""
        anatomy, ends = self._anatomy, self._ends
        own = {name for unit in units[span.start : span.stop] for name in unit.modules}
        made: dict[int, Callable[[nn.Module], nn.Module]] = {}
        for i, layer in enumerate(anatomy.layers):
            if i not in ends.own:
                made[id(model.get_submodule(layer))] = partial(self._passing, i=i)
        if ends.entry is not None:
            made |= {id(model.get_submodule(name)): identity for name in anatomy.early_dropouts}
        if ends.exit == anatomy.num_layers + 1:
            made[id(model.get_submodule(anatomy.head[0]))] = self._ending_head
        keep = [*own, *anatomy.stacks]

        def visit(name: str, module: nn.Module) -> None:
            if id(module) in made or name in own or name in anatomy.stacks:
                return
            around = not name or any(k.startswith(f"{name}.") for k in keep)
            # Lists are looped over and dictionaries looked up, so they stay what they are.
            container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
            if not around and not container and any(True for _ in module.parameters()):
                made[id(module)] = self._stub
                return
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}" if name else child_name, child)

        visit("", model)
        return made

    def _passing(self, module: nn.Module, i: int) -> nn.Module:
        """A foreign layer: gives on what it gets; at the end of the stage, takes it and ends the forward."""
        twin, call, last = hollow(module), self._anatomy.calls[i], self._anatomy.num_layers - 1
        ends, passage = self._ends, self._passage

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = (args, kwargs)
            if ends.exit is not None and i >= ends.exit:
                if i == ends.exit:
                    passage.captured[HIDDEN] = leaf(given, call.hidden)
                for name, path in ends.wanted.get(i, ()):
                    passage.captured[name] = leaf(given, path)
                if i == ends.last_capture:
                    raise EndReached
            hidden = leaf(given, call.hidden)
            if i == last and ends.entry == last + 1:
                hidden = passage.enter()
            return call.returning(hidden)

        twin.forward = forward
        return twin

    def _ending_head(self, module: nn.Module) -> nn.Module:
        twin, place, passage = without_values(module), self._anatomy.head_input, self._passage
        assert place is not None  # else no stage ends before the head

        def forward(*args: Any, **kwargs: Any) -> Any:
            passage.captured[HIDDEN] = leaf((args, kwargs), place)
            raise EndReached

        twin.forward = forward
        return twin

    def _stub(self, module: nn.Module) -> nn.Module:
        """A foreign module before the stage: only the shape of what it puts out matters, which the meta device tells."""
        twin, meta, passage = without_values(module), on_meta(module, hooks=False), self._passage
        shapes: dict[Any, Any] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = (args, kwargs)
            key = (twin.training, *((path, t.shape, t.dtype) for path, t in leaves(given)))
            if key not in shapes:
                if len(shapes) > 64:
                    shapes.clear()
                shapes[key] = output_on_meta(meta, map_leaves(given, lambda t: t.to("meta")))
            return map_leaves(shapes[key], passage.stand_in)

        twin.forward = forward
        return twin


def drop_foreign_parameters(core: nn.Module, own_modules: Sequence[str]) -> None:
    """Takes parameters of foreign units out of modules that hold others' modules too."""
    own = {id(p) for name in own_modules for _, p in named_parts(core, name)}
    for module in core.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) not in own:
                del module._parameters[name]
                module.__dict__[name] = nothing(parameter)
