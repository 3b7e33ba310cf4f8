"""Dissection: finds the anatomy of a model by one forward, which autograd is then asked about.

The forward runs on the meta device, which needs no weights and no memory; where a model needs data to run at all, a few
tokens go through its weights. What was found is kept for models of the same configuration and shapes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .anatomy import Anatomy, Extra, LayerCall
from .meta import Answers
from .recording import NeedsData, Recording
from .self_check import kept_buffers
from .shadow import Path, detached, leaf, leaves, on_meta

Name = TypeVar("Name", bound=Hashable)
FIRST_ARGUMENTS = ((0, 0), (1, "hidden_states"), (1, "x"), (1, "hidden"))

# By what `architecture_of` tells apart. Without weights where that is possible.
_KNOWN: dict[str, Anatomy | UnsupportedModelError] = {}


# (a model that is not changed for a while, its anatomy once it has been asked for)
_unchanged: ContextVar[tuple[PreTrainedModel, list[Anatomy]] | None] = ContextVar("unchanged", default=None)


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Within this context nobody changes a model, whose architecture need not be looked at again for every layer."""
    token = _unchanged.set((model, []))
    try:
        yield
    finally:
        _unchanged.reset(token)


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a model, with or without weights.

    Raises:
        UnsupportedModelError: the model is no row of layers that can be cut; the message says why.
    """
    found = _unchanged.get()
    if found is None or found[0] is not model:
        return _find_anatomy(model)
    if not found[1]:
        found[1].append(_find_anatomy(model))
    return found[1][0]


def _find_anatomy(model: PreTrainedModel) -> Anatomy:
    key = architecture_of(model)
    if key not in _KNOWN:
        try:
            _KNOWN[key] = _record(model)
        except UnsupportedModelError as error:
            _KNOWN[key] = error
    found = _KNOWN[key]
    if isinstance(found, UnsupportedModelError):
        raise UnsupportedModelError(str(found))
    return found


def _record(model: PreTrainedModel) -> Anatomy:
    try:
        return _dissected(model, on_meta)
    except NeedsData as error:
        if any(p.is_meta for p in model.parameters()):
            raise
        try:  # a few tokens through the weights themselves
            with kept_buffers(model):
                return _dissected(model, detached)
        except NeedsData:
            raise error from None


def _dissected(model: PreTrainedModel, twin: Callable[[nn.Module], nn.Module]) -> Anatomy:
    def dissection() -> _Dissection:
        return _Dissection(model, cast(PreTrainedModel, twin(model)))  # nothing stands for a whole model

    try:
        return dissection().anatomy()
    except _OtherStacks:
        return dissection().anatomy(searching=True)


class _OtherStacks(Exception):
    """Not all modules of the heaviest lists run."""


def architecture_of(model: PreTrainedModel) -> str:
    """A digest of everything about a model but the values of its weights."""
    config = model.config
    attention = getattr(config, "_attn_implementation", None)
    digest = hashlib.blake2b(f"{type(model)!r} {attention} {config.to_json_string(use_diff=False)}".encode())
    numbers: dict[int, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        digest.update(f"{name} {type(module)!r} {getattr(module, 'p', None)} {'forward' in vars(module)}".encode())
        # Of PEFT's layers: which of their adapters are used.
        digest.update(f"{vars(module).get('_active_adapter')} {vars(module).get('_disable_adapters')}".encode())
        for own, parameter in module._parameters.items():
            if parameter is not None:
                number = numbers.setdefault(id(parameter), len(numbers))
                digest.update(f"{own} {tuple(parameter.shape)} {parameter.dtype} {number}".encode())
    return digest.hexdigest()


class _Dissection(Recording):
    """A recording that is read off."""

    def anatomy(self, searching: bool = False) -> Anatomy:
        """Runs, and reads off.

        Args:
            searching: whether to find out, by a forward more, which lists of modules run.
        """
        with self._runnable(), Answers() as answers:
            known = self._running_lists() if searching else self._lists()
            self.stacks = self._find_stacks(known)
            lists = [list(known[stack]) for stack in self.stacks]
            self.layers = [layer for layers in lists for layer in layers]
            self.starts = {0, len(lists[0])} if len(lists) > 1 else {0}
            self.head = self._head_module()
            logits = self._record()
            if not searching and {i for i, *_ in self.calls} != set(range(len(self.layers))):
                raise _OtherStacks
            return self._read(logits, answers)

    def _read(self, logits: torch.Tensor, answers: Answers) -> Anatomy:
        order = [i for i, *_ in self.calls]
        if order != list(range(len(self.layers))):
            repeated = len(order) > len(set(order))
            raise self.refuse(
                f"layers of {' and '.join(self.stacks)} run "
                + ("more than once in a forward" if repeated else f"in the order {order[:8]}, not one after the other")
            )
        self._check_sharing()
        calls, early = self._layer_calls()
        outside = self._outside()
        first = self._reached(early, outside)
        entries = [t for _, seen, _, _ in self.calls for _, t in seen if t.requires_grad]
        head, norms, head_input = self._after(logits, outside, entries)
        last = head | norms
        between = self._reached([self.hidden], {n: p for n, p in outside.items() if n not in first | last})
        bridge = self._modules(between, outside, {"before", "between", "after", "head"})
        if between and not all(self.phases.get(name) == {"bridge"} for name in bridge):
            raise self.refuse(f"{sorted(between)[0]} is used between the layers of {' and '.join(self.stacks)}")
        unused = set(outside) - first - last - between
        others = {"after", "head", "between"}
        dropouts = [
            name
            for name, phases in self.phases.items()
            if phases == {"before"} and isinstance(self.twin.get_submodule(name), nn.modules.dropout._DropoutNd)
        ]
        embedding = self._modules(first, outside, others) + self._modules(unused, outside, set())
        middle = self._modules(norms, outside, {"before", "between", "bridge", "head"}) if norms else ()
        end = self._modules(head, outside, {"before", "between", "bridge"} | ({"after"} if head_input else set()))
        tied = {id(p) for p in self.head.parameters()} if self.head is not None else set()
        end = tuple(name for name in end if not self._is_idle(name, tied))
        return Anatomy(
            tuple(self.stacks),
            tuple(self.names[id(layer)] for layer in self.layers),
            tuple(calls),
            embedding + self._without_parameters({"before"}, embedding),
            bridge,
            middle + (self._without_parameters({"after"}, middle) if middle else ()),
            end + self._without_parameters({"head"} if middle else {"after", "head"}, end),
            head_input,
            tuple(dropouts),
            answers.draws,
        )

    def _is_idle(self, name: str, tied: set[int]) -> bool:
        """Whether a module never runs, and holds nothing but what the output embedding has, too."""
        module = self.twin.get_submodule(name) if name in self.names.values() else None
        if module is None or module is self.head or any(name == n or n.startswith(f"{name}.") for n in self.phases):
            return False
        return all(id(p) in tied for p in module.parameters())

    def _check_sharing(self) -> None:
        owner: dict[int, int] = {}
        for i, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                if owner.setdefault(id(parameter), i) != i:
                    raise self.refuse(
                        f"layers {owner[id(parameter)]} and {i} of {self.stacks[0]} share the parameter {name}, which would "
                        "belong to several stages, each with another delay"
                    )
        for name, module in self.twin.named_modules(remove_duplicate=False):
            for own, parameter in module._parameters.items():
                if id(parameter) in owner and not name.startswith(tuple(f"{stack}." for stack in self.stacks)):
                    raise self.refuse(
                        f"layer {owner[id(parameter)]} of {self.stacks[0]} shares a parameter with {name}.{own}, which would "
                        "belong to several stages, each with another delay"
                    )

    def _outside(self) -> dict[str, nn.Parameter]:
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        return {name: p for name, p in self.twin.named_parameters() if id(p) not in inside and p.is_floating_point()}

    def _reached(self, tensors: Sequence[torch.Tensor | None], parameters: Mapping[Name, torch.Tensor]) -> set[Name]:
        """Names of the parameters that tensors depend on."""
        total = [t.float().sum() for t in tensors if t is not None and t.requires_grad]
        if not total or not parameters:
            return set()
        try:
            whole = sum(total[1:], total[0])
            found = torch.autograd.grad(whole, list(parameters.values()), retain_graph=True, allow_unused=True)
        except NotImplementedError as error:
            raise NeedsData(
                f"{self.kind} can't be split into stages: its backward does not run without weights ({str(error)[:200]})"
            ) from error
        return {name for name, gradient in zip(parameters, found, strict=True) if gradient is not None}

    def _level(self, tensor: torch.Tensor) -> int:
        """How many layers a tensor depends on."""
        flat = {(i, n): p for i, layer in enumerate(self.layers) for n, p in layer.named_parameters()}
        flat = {key: p for key, p in flat.items() if p.is_floating_point()}
        return max((i + 1 for i, _ in self._reached([tensor], flat)), default=0)

    def _layer_calls(self) -> tuple[list[LayerCall], list[torch.Tensor]]:
        """Every layer's call, and the tensors that the layers get from before them."""
        calls: list[LayerCall] = []
        early: list[torch.Tensor] = []
        extras: dict[int, Extra] = {}
        made: dict[int, int] = {}  # id of what a layer returned -> number of layers run by then
        previous: torch.Tensor | None = None
        for i, seen, output, given in self.calls:
            main = None if i in self.starts else next((path for path, tensor in seen if tensor is previous), None)
            if main is None:
                main = next((path for path, t in seen if path in FIRST_ARGUMENTS and t.requires_grad), None)
            if main is None:
                raise self.refuse(f"no hidden state was found among the arguments of layer {i}")
            if i == 0:
                early.append(leaf(given, main))
            found: dict[Path, Extra] = {}
            begins = i > 0 and i in self.starts  # its hidden state comes from before, as extras do
            for path, tensor in seen:
                if not begins and (path == main or tensor is leaf(given, main)):
                    continue
                if not (tensor.requires_grad or id(tensor) in made):
                    continue
                if id(tensor) not in extras:
                    level = self._level(tensor) if tensor.requires_grad else made[id(tensor)]
                    extras[id(tensor)] = Extra(f"extra{len(extras)}", level, tensor.requires_grad)
                    if level == 0:
                        early.append(tensor)
                found[path] = extras[id(tensor)]
            for _, tensor in leaves(output):
                made.setdefault(id(tensor), i + 1)
            form = self._form(output)
            calls.append(LayerCall(main, found, form.length, form.slot))
            previous = form.hidden_of(output)
        return calls, early

    def _after(
        self, logits: torch.Tensor, outside: Mapping[str, nn.Parameter], entries: list[torch.Tensor]
    ) -> tuple[set[str], set[str], Path | None]:
        """Parameters of the head, those between layers and head, and the place where a stage may begin with the head."""
        assert self.cut is not None  # the last layer has run
        sources = [before for before, _ in self.head_inputs]
        past = {str(i): t for i, t in enumerate(entries)}
        if self._reached([logits, *sources], past):
            raise self.refuse("something goes past its layers to the head")
        head = self._reached([logits], outside)
        norms = self._reached(sources, outside)
        alone = len(self.head_inputs) == 1 and not self._reached([logits], {"cut": self.cut}) and not head & norms
        if not self._reached([logits, *sources], {"cut": self.cut}):
            raise self.refuse("its logits don't depend on what its last layer returns")
        return (head, norms, (0, 0)) if alone else (head | norms, set(), None)

    def _modules(self, group: set[str], outside: Mapping[str, nn.Parameter], others: set[str]) -> tuple[str, ...]:
        """Names of the largest modules (and single parameters) outside of the layers that are a group's and nobody else's.

        Args:
            group: names of parameters.
            outside: all parameters outside of the layers.
            others: phases of a forward in which a module of this group doesn't run; one that runs in several, because its
                matrix is also the head's, belongs to all of them.
        """
        ids = {id(outside[name]) for name in group}
        found: list[str] = []
        covered: set[int] = set()

        def foreign(name: str, module: nn.Module) -> bool:
            for sub, part in module.named_modules(prefix=name):
                phases = self.phases.get(sub, set())
                if phases and phases <= others and next(part.parameters(), None) is not None:
                    return True
            return False

        def visit(name: str, module: nn.Module) -> None:
            if name in self.stacks:
                return
            own = [p for p in module.parameters() if p.is_floating_point()]
            around = self._is_around(name)
            if own and not around and all(id(p) in ids for p in own) and not foreign(name, module):
                found.append(name)
                covered.update(id(p) for p in own)
                return
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}" if name else child_name, child)

        visit("", self.twin)
        if self.head is not None and (head := self.names[id(self.head)]) in found:  # the stage begins with it
            found.remove(head)
            found.insert(0, head)
        # Parameters of modules that hold the layers, too, are named by themselves.
        return tuple(found) + tuple(name for name in sorted(group) if id(outside[name]) not in covered)

    def _without_parameters(self, when: set[str], known: Sequence[str]) -> tuple[str, ...]:
        """Names of the modules without parameters (dropout, rotary positions) that run in some phases only."""
        found: list[str] = []
        for name, phases in sorted(self.phases.items(), key=lambda item: item[0].count(".")):
            inside = any(name.startswith(f"{other}.") for other in (*known, *found))
            parameters = any(True for _ in self.twin.get_submodule(name).parameters())
            if phases <= when and not inside and not parameters:
                found.append(name)
        return tuple(found)
