"""Recording: one forward of a model, with the calls of its layers written down and the graph cut behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .anatomy import LayerCall
from .meta import batched_experts, call_options, is_encoder_decoder, logits_of, probe_inputs
from .shadow import Path, leaves

PROBE_SHAPE = (2, 16)


class NeedsData(UnsupportedModelError):
    """The forward does not run on the meta device."""


class Recording:
    """One forward of a model's shadow, on the meta device or with weights.

    Args:
        model: the model.
        twin: its shadow, whose layers are recorded.

    Attributes:
        stacks: names of the lists of layers; these four are known before anything is recorded.
        layers: all of them.
        starts: numbers of the layers that begin a stack.
        head: the output embedding; None for none.
    """

    stacks: list[str]
    layers: list[nn.Module]
    starts: set[int]
    head: nn.Module | None

    def __init__(self, model: PreTrainedModel, twin: PreTrainedModel):
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

    # ---- running ----

    def _runnable(self) -> Any:
        return batched_experts(self.config)

    def _run(self) -> torch.Tensor:
        device = next(self.twin.get_input_embeddings().parameters()).device
        try:
            return logits_of(self.twin(**probe_inputs(self.twin, *PROBE_SHAPE, device), **call_options(self.twin)))
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever a model does that needs data or more than token ids
            raise NeedsData(
                f"{self.kind} can't be split into stages: its forward does not run on token ids alone, or not without "
                f"weights ({type(error).__name__}: {str(error)[:200]})"
            ) from error

    def _lists(self) -> dict[str, nn.ModuleList]:
        return {n: m for n, m in self.twin.named_modules() if isinstance(m, nn.ModuleList) and len(m)}

    def _running_lists(self) -> dict[str, nn.ModuleList]:
        """The lists all of whose modules run."""
        lists = self._lists()
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
        return {name: modules for name, modules in lists.items() if ran[name] >= len(modules)}

    def _find_stacks(self, lists: Mapping[str, nn.ModuleList]) -> list[str]:
        """Names of the lists of layers: the heaviest of those in no other one, of an encoder and a decoder each."""
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        if not outer:
            raise self.refuse("it has no list of modules all of which run, so no row of layers")
        parts = [""]
        if is_encoder_decoder(self.twin):
            parts = [f"{self.names[id(part)]}." for part in (self.twin.get_encoder(), self.twin.get_decoder())]
        found = []
        for part in parts:
            inside = [name for name in outer if name.startswith(part)]
            if not inside:
                raise self.refuse(f"{part.rstrip('.')} has no list of modules all of which run, so no row of layers")
            found.append(max(inside, key=lambda name: sum(p.numel() for p in lists[name].parameters())))
        return found

    def _is_around(self, name: str) -> bool:
        """Whether a module holds layers, or is a list of them."""
        return not name or any(f"{stack}.".startswith(f"{name}.") for stack in self.stacks)

    def _head_module(self) -> nn.Module | None:
        head = self.twin.get_output_embeddings()
        return head if isinstance(head, nn.Module) and id(head) in self.names else None

    def _record(self) -> torch.Tensor:
        inside = {id(m) for layer in self.layers for m in layer.modules()}
        handles = []
        for name, module in self.twin.named_modules():
            if id(module) not in inside and not self._is_around(name):

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
                self.phase = "bridge" if i + 1 in self.starts else self.phase
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
