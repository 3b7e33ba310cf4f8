"""ShadowStage: a stage that is the model itself, running its own forward, whose foreign layers pass through.

A stage of layers 1 and 2 of four:

    token ids -> [stub] -> [passes] -> [layer 1] -> [layer 2] -> [captures, and ends the forward]
                                       ^ gets what was received, whatever the stub has put out

Masks, rotary positions, layer types, soft caps and multipliers are thus the model's own. What comes before the stage's
layers only has to have the right shapes; what comes after them never runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .anatomy import HIDDEN, Anatomy
from .balancing import CHOSEN, PROBABILITIES, RouterLogits
from .compiled import Compilation, compiled
from .late_logits import with_late_logits, without_late
from .meta import call_options
from .model_inputs import batch_keys, check_config, foreign_outputs, of_last_stage, tokens_of, without_unused_labels
from .one_call import OneCall
from .ownership import named_parts
from .shadow import Path, hollow, hook_dicts, leaf, leaves, map_leaves, on_meta, shadow, with_leaf
from .stages import Boundary, Finish, Memory, Stage
from .stand_ins import identity, nothing, output_on_meta, without_values
from .units import StageSpan, Unit

if TYPE_CHECKING:
    from .families import Family


class _EndReached(Exception):
    """The forward has got to the end of the stage."""


class ShadowStage(Stage):
    """A shadow of the whole model, of which only some units are real.

    Args:
        model: the model; parameters of other stages may be on the meta device.
        family: what made this stage.
        anatomy: of the model.
        units: all units of the model.
        span: which of them belong to this stage.
        num_stages: K.
    """

    _core: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        anatomy: Anatomy,
        units: Sequence[Unit],
        span: StageSpan,
        num_stages: int,
    ):
        super().__init__(model.config, family, units, span, num_stages)
        self.check_config()
        self.batch_keys, self.foreign_outputs = batch_keys(model), foreign_outputs(model)
        self.draws = anatomy.draws
        self._options = call_options(model)
        self._anatomy = anatomy
        # Unit 0 is the embedding, unit 1 + i layer i: a stage that begins with unit u receives what crosses boundary u - 1.
        self._entry = None if self.is_first else span.start - 1
        self._exit = None if self.is_last else span.stop - 1
        self._own = range(max(span.start - 1, 0), min(span.stop - 1, anatomy.num_layers))
        carried_in = {} if self._entry is None else anatomy.carried(self._entry)
        carried_out = {} if self._exit is None else anatomy.carried(self._exit)
        self._relayed = [name for name in carried_out if name in carried_in]
        given = None if self._exit is None else anatomy.hidden_from(self._exit)
        self._relayed_hidden = given if given in carried_in else None
        wanted = {name: places[0] for name, places in carried_out.items() if name not in carried_in}
        self._wanted = {i: [(n, p) for n, (j, p) in wanted.items() if j == i] for i, _ in wanted.values()}
        self._last_capture = max([self._exit or 0, *self._wanted])
        self._received: Boundary | None = None
        self._captured: Boundary = {}
        self._entered = False
        self._stub_device = torch.device("cpu")
        self._stubs_have_memory = False
        # The shadow is not a child: its children are this module's children, under the same names.
        core = shadow(model, self._replacements(model, units, span))
        for name in hook_dicts(core):  # `module_hooks.py` tells which of the model's are a stage's
            core.__dict__[name] = type(core.__dict__[name])()
        self.__dict__["_core"] = core
        self._modules, self._parameters, self._buffers = core._modules, core._parameters, core._buffers
        self._drop_foreign_parameters(core)
        self._open(core)
        if self.is_last and (head := model.get_output_embeddings()) is not None:
            with_late_logits(core.get_submodule(next(name for name, m in model.named_modules() if m is head)))
        self._compiled: dict[nn.Module, Callable[..., Any]] = {}
        self._compilation: Compilation | None = None
        self._routers: RouterLogits | None = None
        if num_stages > 1 and getattr(model.config, "output_router_logits", False):
            before = anatomy.layers[: self._own.start]
            self._routers = RouterLogits(model, core, tuple(anatomy.layers[i] for i in self._own), before)

    def forward(
        self,
        batch: dict[str, torch.Tensor],
        received: Boundary | None = None,
        memory: Memory | None = None,
        finish: Finish | None = None,
    ) -> Boundary | Any:
        """See `Stage.forward`; `memory` is not used.

        Raises:
            EngineError: the batch has no tokens.
            UnsupportedModelError: the forward did not come by the stage's beginning or end.
        """
        self._stub_device = tokens_of(batch).device
        batch, keys = without_unused_labels(batch, self.batch_keys)
        if not self.is_last:
            return self._attempt(batch, received)
        run = partial(self._attempt, received=received)
        call = OneCall(run, batch, keys, self.foreign_outputs, alone=self.is_first)
        if finish is not None:
            return finish(call)
        output: Any = call(**batch)
        return output.logits

    def _attempt(self, inputs: dict[str, Any], received: Boundary | None) -> Any:
        try:
            return self._run(inputs, received)
        except RuntimeError as error:
            # The model writes into what a stub has put out (as at set-up already): then it has to have memory.
            if self._stubs_have_memory or "single memory location" not in str(error):
                raise
            self._stubs_have_memory = True
            return self._run(inputs, received)

    def _run(self, inputs: dict[str, Any], received: Boundary | None) -> Any:
        self._received, self._captured = received, {}
        self._entered = self._entry is None
        try:
            output = self._call(inputs, received)
        except _EndReached:
            self._check(self._entered, "beginning")
            if self._routers is not None:
                self._captured |= self._routers.sums(received, inputs.get("attention_mask"))
            relayed = {name: name for name in self._relayed}
            if self._relayed_hidden is not None:
                relayed[HIDDEN] = self._relayed_hidden
            if relayed:
                assert received is not None  # only what is received is relayed
                for name, source in relayed.items():  # a view: a node at which gradients from further on arrive first
                    self._captured[name] = received[source].view_as(received[source])
            return self._captured
        finally:
            self._received, self._captured = None, {}
        self._check(self._entered, "beginning")
        self._check(self.is_last, "end")
        return output

    def _call(self, inputs: dict[str, Any], received: Boundary | None) -> Any:
        if self._routers is None:
            output = self._core(**{**self._options, **inputs})
        else:
            self._routers.begin()
            with self._routers.finishing(received, tokens_of(inputs).shape[:2].numel()):
                output = self._core(**{**self._options, **inputs})
        output = without_late(output)
        return output if received is None else of_last_stage(output)

    def trains(self, name: str, tensor: torch.Tensor) -> bool:
        """See `Stage.trains`."""
        if name in (HIDDEN, PROBABILITIES):
            return tensor.is_floating_point() and self.first_trained < self.start
        if name == CHOSEN or not self._anatomy.trained(name):
            return False
        return tensor.is_floating_point() and self.first_trained <= self._anatomy.level(name)  # on which it depends

    def check_config(self) -> None:
        """See `Stage.check_config`."""
        if not (self.is_first and self.is_last):
            check_config(self.config)

    def completes(self, unit: int) -> bool:
        """See `Stage.completes`."""
        last = self._anatomy.num_layers + 1
        if self._entry == last and unit < last:
            return False
        return self.is_last or (self._exit == last and unit <= last)

    def train(self, mode: bool = True) -> ShadowStage:
        """Switches the stage, the shadow's root included."""
        self._core.training = mode
        return super().train(mode)

    def compile_layers(self, compilation: Compilation) -> None:
        """See `Stage.compile_layers`."""
        if self._routers is not None:
            raise UnsupportedModelError(
                "torch_compile with output_router_logits=True: routers are looked at while they run; leave one of them off"
            )
        self.compiles = True
        if compilation == self._compilation:
            return
        self._compilation = compilation
        for i in self._own:
            layer = self._core.get_submodule(self._anatomy.layers[i])
            self._compiled[layer] = compiled(layer, i, self._anatomy.calls[i].hidden, compilation)
            if layer._compiled_call_impl is None:
                layer._compiled_call_impl = partial(self._run_layer, layer)

    def _check(self, reached: bool, where: str) -> None:
        if not reached:
            raise UnsupportedModelError(
                f"a forward of {type(self._core).__name__} did not come by the {where} of stage {self.index}: it skipped a "
                "layer or ran them in another order than at set-up, which stages can't reproduce"
            )

    # ---- making the shadow ----

    def _replacements(self, model: PreTrainedModel, units: Sequence[Unit], span: StageSpan) -> dict[int, Any]:
        """What stands in the place of foreign layers, and of the largest foreign modules outside of the layers."""
        anatomy = self._anatomy
        own = {name for unit in units[span.start : span.stop] for name in unit.modules}
        made: dict[int, Callable[[nn.Module], nn.Module]] = {}
        for i, layer in enumerate(anatomy.layers):
            if i not in self._own:
                made[id(model.get_submodule(layer))] = partial(self._passing, i=i)
        if not self.is_first:
            made |= {id(model.get_submodule(name)): identity for name in anatomy.early_dropouts}
        if self._exit == anatomy.num_layers + 1:
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

    def _drop_foreign_parameters(self, core: nn.Module) -> None:
        """Takes parameters of foreign units out of modules that hold others' modules too."""
        own = {id(p) for name in self._own_modules() for _, p in named_parts(core, name)}
        for module in core.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) not in own:
                    del module._parameters[name]
                    module.__dict__[name] = nothing(parameter)

    def _own_modules(self) -> list[str]:
        anatomy = self._anatomy
        outside = [*(anatomy.embedding if self.is_first else ()), *self.head_names]
        return [*outside, *(name for i in self._own for name in (anatomy.layers[i], *anatomy.beside(i)))]

    def _open(self, core: nn.Module) -> None:
        """Lets what is received in, and what the last layer puts out leave."""
        anatomy, layers = self._anatomy, [core.get_submodule(name) for name in self._anatomy.layers]
        if self._entry is not None:
            places = anatomy.carried(self._entry)
            for i in self._own:
                extras = [(name, path) for name, found in places.items() for j, path in found if j == i]
                if i == self._entry or extras:
                    self._inject(layers[i], anatomy.calls[i].hidden if i == self._entry else None, extras)
            if self._entry == anatomy.num_layers + 1:
                self._inject(core.get_submodule(anatomy.head[0]), anatomy.head_input, [])
        if self._exit == anatomy.num_layers:
            self._end_after(layers[anatomy.num_layers - 1])

    def _inject(self, module: nn.Module, hidden: Path | None, extras: Sequence[tuple[str, Path]]) -> None:
        def injected(*args: Any, **kwargs: Any) -> Any:
            given: Any = (args, kwargs)
            received = self._received
            assert received is not None  # only a stage with others before it has an entry
            if hidden is not None:
                self._entered = True
                given = with_leaf(given, hidden, received[HIDDEN])
            for name, path in extras:
                given = with_leaf(given, path, received[name])
            return self._run_layer(module, *given[0], **given[1])

        module._compiled_call_impl = injected  # around the module's hooks, which see what it is given

    def _end_after(self, layer: nn.Module) -> None:
        run = layer._compiled_call_impl or partial(self._run_layer, layer)
        call = self._anatomy.calls[-1]

        def ending(*args: Any, **kwargs: Any) -> Any:
            self._captured[HIDDEN] = call.hidden_of(run(*args, **kwargs))
            raise _EndReached

        layer._compiled_call_impl = ending  # around the layer's hooks, which may change what it returns

    def _run_layer(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self._compiled.get(module, module._call_impl) if self.compiles else module._call_impl
        return run(*args, **kwargs)

    # ---- what stands in for foreign modules ----

    def _passing(self, module: nn.Module, i: int) -> nn.Module:
        """A foreign layer: gives on what it gets; at the end of the stage, takes it and ends the forward."""
        twin, call, last = hollow(module), self._anatomy.calls[i], self._anatomy.num_layers - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = (args, kwargs)
            if self._exit is not None and i >= self._exit:
                if i == self._exit:
                    self._captured[HIDDEN] = leaf(given, call.hidden)
                for name, path in self._wanted.get(i, ()):
                    self._captured[name] = leaf(given, path)
                if i == self._last_capture:
                    raise _EndReached
            hidden = leaf(given, call.hidden)
            if i == last and self._entry == last + 1:
                self._entered = True
                assert self._received is not None  # there are stages before an entry
                hidden = self._received[HIDDEN]
            return call.returning(hidden)

        twin.forward = forward
        return twin

    def _ending_head(self, module: nn.Module) -> nn.Module:
        twin, place = without_values(module), self._anatomy.head_input
        assert place is not None  # else no stage ends before the head

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._captured[HIDDEN] = leaf((args, kwargs), place)
            raise _EndReached

        twin.forward = forward
        return twin

    def _stub(self, module: nn.Module) -> nn.Module:
        """A foreign module before the stage: only the shape of what it puts out matters, which the meta device tells."""
        twin, meta = without_values(module), on_meta(module, hooks=False)
        shapes: dict[Any, Any] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = (args, kwargs)
            key = (self.training, *((path, t.shape, t.dtype) for path, t in leaves(given)))
            if key not in shapes:
                if len(shapes) > 64:
                    shapes.clear()
                shapes[key] = output_on_meta(meta, map_leaves(given, lambda t: t.to("meta")))
            return map_leaves(shapes[key], self._stand_in)

        twin.forward = forward
        return twin

    def _stand_in(self, like: torch.Tensor) -> torch.Tensor:
        stand_in = nothing(like, self._stub_device)
        return stand_in.contiguous() if self._stubs_have_memory else stand_in
