"""Anatomy of an architecture: what crosses the boundaries of its layers and which modules come before and after them.

It is found by one forward on the meta device, which needs no weights and no memory: a shadow of the model runs with its
layers recorded, and autograd tells what depends on what. It is kept for models of the same configuration and shapes.

    boundaries of a model with two layers, by what is there

        ids -> [embedding] --(0)--> [layer 0] --(1)--> [layer 1] --(2)--> [norm] --(3)--> [head] -> logits

The state at boundary b < L is the input of layer b; at L it is the output of the last layer; at L + 1 the input of the
output embedding, where that is all that the logits depend on.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .shadow import Path, detached, leaf, leaves, on_meta

HIDDEN = "hidden"
PROBE_SHAPE = (2, 16)
FIRST_ARGUMENTS = ((0, 0), (1, "hidden_states"), (1, "x"), (1, "hidden"))


@dataclass(frozen=True)
class Extra:
    """A tensor besides the hidden state that layers receive and that depends on parameters or earlier layers.

    Args:
        name: by which it crosses boundaries.
        level: how many layers have run when it is there.
        trained: whether a gradient flows back through it.
    """

    name: str
    level: int
    trained: bool


@dataclass(frozen=True)
class LayerCall:
    """How a layer is called and what it returns.

    Args:
        hidden: place of the hidden state in (args, kwargs).
        extras: {place in (args, kwargs): what is there}.
        length: how many values it returns as a tuple; None where it returns the hidden state alone.
        slot: which of them is the hidden state.
    """

    hidden: Path
    extras: Mapping[Path, Extra] = field(default_factory=dict)
    length: int | None = None
    slot: int = 0

    def hidden_of(self, output: Any) -> torch.Tensor:
        """The hidden state in what the layer returned."""
        return output if self.length is None else output[self.slot]

    def returning(self, hidden: torch.Tensor) -> Any:
        """What the layer would return with this hidden state, and nothing else."""
        if self.length is None:
            return hidden
        return tuple(hidden if i == self.slot else None for i in range(self.length))


@dataclass(frozen=True)
class Anatomy:
    """What stages have to know about an architecture.

    Args:
        stack: name of the list of layers.
        calls: how every layer is called, in order.
        embedding: names of the modules before the layers (and of those with parameters that nobody uses); parameters of
            modules that hold the layers, too, are named by themselves, here and below.
        norms: names of the modules between the layers and the head.
        head: names of the modules from the output embedding on, or of all modules after the layers.
        head_input: place of the hidden state in the arguments of `head[0]`, if a stage may begin there; else None.
        early_dropouts: names of the dropout modules that run before the layers.
        draws: whether a forward in training mode draws random numbers.
    """

    stack: str
    calls: tuple[LayerCall, ...]
    embedding: tuple[str, ...]
    norms: tuple[str, ...]
    head: tuple[str, ...]
    head_input: Path | None
    early_dropouts: tuple[str, ...]
    draws: bool

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.calls)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(f"{self.stack}.{i}" for i in range(self.num_layers))

    def carried(self, boundary: int) -> dict[str, list[tuple[int, Path]]]:
        """What crosses a boundary besides the hidden state: name -> (layer, place) of all who get it later."""
        found: dict[str, list[tuple[int, Path]]] = {}
        for i in range(boundary, self.num_layers):
            for path, extra in self.calls[i].extras.items():
                if extra.level <= boundary:
                    found.setdefault(extra.name, []).append((i, path))
        return found

    def trained(self, name: str) -> bool:
        """Whether a gradient flows back through what crosses boundaries by this name."""
        return name == HIDDEN or any(e.name == name and e.trained for call in self.calls for e in call.extras.values())


# By what `_key` tells apart. Without weights where that is possible.
_KNOWN: dict[str, Anatomy | UnsupportedModelError] = {}


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a model, with or without weights.

    Raises:
        UnsupportedModelError: the model is no row of layers that can be cut; the message says why.
    """
    key = _key(model)
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
        return _Recording(model, on_meta(model)).anatomy()
    except _NeedsData as error:
        if any(p.is_meta for p in model.parameters()):
            raise
        try:  # a few tokens through the weights themselves
            return _Recording(model, detached(model)).anatomy()
        except _NeedsData:
            raise error from None


def _key(model: PreTrainedModel) -> str:
    config = model.config
    attention = getattr(config, "_attn_implementation", None)
    digest = hashlib.blake2b(f"{type(model)!r} {attention} {config.to_json_string(use_diff=False)}".encode())
    numbers: dict[int, int] = {}
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module)!r} {getattr(module, 'p', None)} {'forward' in vars(module)}".encode())
        for own, parameter in module._parameters.items():
            if parameter is not None:
                number = numbers.setdefault(id(parameter), len(numbers))
                digest.update(f"{own} {tuple(parameter.shape)} {parameter.dtype} {number}".encode())
    return digest.hexdigest()


def call_options(model: nn.Module) -> dict[str, Any]:
    """What a forward for training is called with besides a batch."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a model returned."""
    return output.logits if hasattr(output, "logits") else output[0]


class Answers(TorchDispatchMode):
    """Answers for values that are not there on the meta device, and notes whether random numbers are drawn.

    Every scalar is 1 or True; of everything there is one that is not zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) and args[0].is_meta else None
        if tensor is not None:
            if func is torch.ops.aten._local_scalar_dense.default:
                if tensor.dtype is torch.bool:
                    return True
                return 1.0 if tensor.is_floating_point() else 1
            if func is torch.ops.aten.nonzero.default:
                return torch.empty(1, tensor.dim(), dtype=torch.long, device="meta")
            if func is torch.ops.aten.where.default:
                return [torch.empty(1, dtype=torch.long, device="meta") for _ in range(tensor.dim())]
            if func is torch.ops.aten.equal.default:
                return True
        return func(*args, **(kwargs or {}))


class _NeedsData(UnsupportedModelError):
    """The forward does not run on the meta device."""


class _Recording:
    """One forward of a model's shadow, on the meta device or with weights."""

    def __init__(self, model: PreTrainedModel, twin: nn.Module):
        self.kind = type(model).__name__
        self.twin = twin.train()
        # A mixture's experts loop over what was routed to them, which needs data, in some implementations.
        self.config = self.twin.config
        self.names = {id(module): name for name, module in self.twin.named_modules()}
        self.calls: list[tuple[int, list[tuple[Path, torch.Tensor]], Any, Any]] = []
        self.phases: dict[str, set[str]] = {}  # outside module -> when it ran
        self.phase = "before"
        self.hidden: torch.Tensor | None = None  # of the last layer, before the graph is cut there
        self.cut: torch.Tensor | None = None
        self.head_inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def refuse(self, why: str) -> UnsupportedModelError:
        """The refusal."""
        return UnsupportedModelError(f"{self.kind} can't be split into stages: {why}")

    def anatomy(self) -> Anatomy:
        """Runs, and reads off."""
        with self._runnable(), Answers() as answers:
            self.stack = self._find_stack()
            self.layers = list(self.twin.get_submodule(self.stack))
            self.head = self._head_module()
            logits = self._record()
            return self._read(logits, answers)

    # ---- running ----

    def _runnable(self) -> Any:
        return batched_experts(self.config)

    def _run(self) -> torch.Tensor:
        device = next(self.twin.get_input_embeddings().parameters()).device
        ids = torch.zeros(PROBE_SHAPE, dtype=torch.long, device=device)
        try:
            return logits_of(self.twin(input_ids=ids, **call_options(self.twin)))
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever a model does that needs data or more than token ids
            raise _NeedsData(
                f"{self.kind} can't be split into stages: its forward does not run on token ids alone, or not without "
                f"weights ({type(error).__name__}: {str(error)[:200]})"
            ) from error

    def _find_stack(self) -> str:
        """Name of the list of layers: the heaviest one of those all of whose modules run."""
        lists = {n: m for n, m in self.twin.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        ran: dict[str, int] = dict.fromkeys(lists, 0)
        handles = []
        for name, modules in lists.items():
            for module in modules:

                def count(*_: Any, name: str = name) -> None:
                    ran[name] += 1

                handles.append(module.register_forward_pre_hook(count))
        try:
            with torch.no_grad():
                self._run()
        finally:
            for handle in handles:
                handle.remove()
        running = [name for name in lists if ran[name] >= len(lists[name])]
        outer = [name for name in running if not any(name.startswith(f"{other}.") for other in running)]
        if not outer:
            raise self.refuse("it has no list of modules all of which run, so no row of layers")
        return max(outer, key=lambda name: sum(p.numel() for p in lists[name].parameters()))

    def _head_module(self) -> nn.Module | None:
        head = self.twin.get_output_embeddings()
        return head if isinstance(head, nn.Module) and id(head) in self.names else None

    def _record(self) -> torch.Tensor:
        inside = {id(m) for layer in self.layers for m in layer.modules()}
        handles = []
        for name, module in self.twin.named_modules():
            if id(module) not in inside and name != self.stack and not (self.stack + ".").startswith(name + "."):

                def note(module: nn.Module, *_: Any, name: str = name) -> None:
                    if module is self.head and self.phase == "after":
                        self.phase = "head"
                    self.phases.setdefault(name, set()).add(self.phase)

                handles.append(module.register_forward_pre_hook(note))
        for i, layer in enumerate(self.layers):
            self._record_layer(i, layer)
        if self.head is not None:
            self._record_head(self.head)
        try:
            return self._run()
        finally:
            for handle in handles:
                handle.remove()
            for module in (*self.layers, self.head):
                if module is not None:
                    vars(module).pop("forward", None)

    def _record_layer(self, i: int, layer: nn.Module) -> None:
        forward = layer.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.phase = "between"
            seen = [(path, tensor) for path, tensor in leaves((args, kwargs))]
            output = forward(*args, **kwargs)
            self.calls.append((i, seen, output, (args, kwargs)))
            if i < len(self.layers) - 1:
                return output
            self.phase = "after"
            call = self._form(output)
            self.hidden = call.hidden_of(output)
            self.cut = self.hidden.detach().requires_grad_()
            if call.length is None:
                return self.cut
            return tuple(self.cut if s == call.slot else value for s, value in enumerate(output))

        layer.forward = recorded

    def _record_head(self, head: nn.Module) -> None:
        forward = head.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self.phase == "head" and args and isinstance(args[0], torch.Tensor):
                cut = args[0].detach().requires_grad_()
                self.head_inputs.append((args[0], cut))
                args = (cut, *args[1:])
            return forward(*args, **kwargs)

        head.forward = recorded

    def _form(self, output: Any) -> LayerCall:
        if isinstance(output, torch.Tensor):
            return LayerCall(())
        if type(output) in (tuple, list):
            slot = next((i for i, value in enumerate(output) if isinstance(value, torch.Tensor)), None)
            if slot is not None:
                return LayerCall((), {}, len(output), slot)
        raise self.refuse(f"its layers return a {type(output).__name__}, not a tensor or a tuple that has one")

    # ---- reading ----

    def _read(self, logits: torch.Tensor, answers: Answers) -> Anatomy:
        order = [i for i, *_ in self.calls]
        if order != list(range(len(self.layers))):
            repeated = len(order) > len(set(order))
            raise self.refuse(
                f"layers of {self.stack} run "
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
        if between:
            raise self.refuse(f"{sorted(between)[0]} is used between the layers of {self.stack}")
        unused = set(outside) - first - last
        others = {"after", "head", "between"}
        dropouts = [
            name
            for name, phases in self.phases.items()
            if phases == {"before"} and isinstance(self.twin.get_submodule(name), nn.modules.dropout._DropoutNd)
        ]
        embedding = self._modules(first, outside, others) + self._modules(unused, outside, set())
        middle = self._modules(norms, outside, {"before", "between", "head"}) if norms else ()
        end = self._modules(head, outside, {"before", "between"} | ({"after"} if head_input else set()))
        return Anatomy(
            self.stack,
            tuple(calls),
            embedding + self._without_parameters({"before"}, embedding),
            middle + (self._without_parameters({"after"}, middle) if middle else ()),
            end + self._without_parameters({"head"} if middle else {"after", "head"}, end),
            head_input,
            tuple(dropouts),
            answers.draws,
        )

    def _check_sharing(self) -> None:
        owner: dict[int, int] = {}
        for i, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                if owner.setdefault(id(parameter), i) != i:
                    raise self.refuse(
                        f"layers {owner[id(parameter)]} and {i} of {self.stack} share the parameter {name}, which would "
                        "belong to several stages, each with another delay"
                    )

    def _outside(self) -> dict[str, nn.Parameter]:
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        return {name: p for name, p in self.twin.named_parameters() if id(p) not in inside and p.is_floating_point()}

    @staticmethod
    def _reached(tensors: Sequence[torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> set[str]:
        """Names of the parameters that tensors depend on."""
        total = [t.float().sum() for t in tensors if t is not None and t.requires_grad]
        if not total or not parameters:
            return set()
        found = torch.autograd.grad(sum(total), list(parameters.values()), retain_graph=True, allow_unused=True)
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
            main = next((path for path, tensor in seen if tensor is previous), None)
            if main is None:
                main = next((path for path, t in seen if path in FIRST_ARGUMENTS and t.requires_grad), None)
            if main is None:
                raise self.refuse(f"no hidden state was found among the arguments of layer {i}")
            if i == 0:
                early.append(leaf(given, main))
            found: dict[Path, Extra] = {}
            for path, tensor in seen:
                if path == main or tensor is leaf(given, main) or not (tensor.requires_grad or id(tensor) in made):
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
                if part._parameters and phases and phases <= others:
                    return True
            return False

        def visit(name: str, module: nn.Module) -> None:
            if name == self.stack:
                return
            own = [p for p in module.parameters() if p.is_floating_point()]
            around = not name or self.stack.startswith(f"{name}.")
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


class batched_experts:
    """Within this context, experts are computed for all tokens at once, which needs no data."""

    def __init__(self, config: Any):
        self.configs = [c for c in (config, getattr(config, "text_config", None)) if c is not None]
        self.before: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        for config in self.configs:
            if hasattr(config, "_experts_implementation"):
                self.before.append((config, config._experts_implementation))
                config._experts_implementation = "batched_mm"

    def __exit__(self, *_: Any) -> None:
        for config, value in self.before:
            config._experts_implementation = value
