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
from .foreign import EndReached, Ends, ForeignModules, Passage, drop_foreign_parameters
from .late_logits import with_late_logits, without_late
from .meta import call_options
from .model_inputs import batch_keys, check_config, foreign_outputs, of_last_stage, tokens_of, without_unused_labels
from .one_call import OneCall
from .shadow import Path, hook_dicts, shadow, with_leaf
from .stages import Boundary, Finish, Memory, Stage
from .units import StageSpan, Unit

if TYPE_CHECKING:
    from .families import Family


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
        self._ends = Ends(anatomy, span, self.is_first, self.is_last)
        self._passage = Passage()
        # The shadow is not a child: its children are this module's children, under the same names.
        core = shadow(model, ForeignModules(anatomy, self._ends, self._passage).replacements(model, units, span))
        for name in hook_dicts(core):  # `module_hooks.py` tells which of the model's are a stage's
            core.__dict__[name] = type(core.__dict__[name])()
        self.__dict__["_core"] = core
        self._modules, self._parameters, self._buffers = core._modules, core._parameters, core._buffers
        drop_foreign_parameters(core, self._own_modules())
        self._open(core)
        if self.is_last and (head := model.get_output_embeddings()) is not None:
            with_late_logits(core.get_submodule(next(name for name, m in model.named_modules() if m is head)))
        self._compiled: dict[nn.Module, Callable[..., Any]] = {}
        self._compilation: Compilation | None = None
        self._routers: RouterLogits | None = None
        if num_stages > 1 and getattr(model.config, "output_router_logits", False):
            before = anatomy.layers[: self._ends.own.start]
            self._routers = RouterLogits(model, core, tuple(anatomy.layers[i] for i in self._ends.own), before)

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
        self._passage.device = tokens_of(batch).device
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
            if self._passage.stand_ins_have_memory or "single memory location" not in str(error):
                raise
            self._passage.stand_ins_have_memory = True
            return self._run(inputs, received)

    def _run(self, inputs: dict[str, Any], received: Boundary | None) -> Any:
        passage = self._passage
        passage.begin(received, entered=self._ends.entry is None)
        try:
            output = self._call(inputs, received)
        except EndReached:
            self._check(passage.entered, "beginning")
            if self._routers is not None:
                passage.captured |= self._routers.sums(received, inputs.get("attention_mask"))
            for name, source in self._ends.relayed.items():
                assert received is not None  # only what is received is relayed
                # A view: a node at which gradients from further on arrive first.
                passage.captured[name] = received[source].view_as(received[source])
            return passage.captured
        finally:
            passage.end()
        self._check(passage.entered, "beginning")
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
        if self._ends.entry == last and unit < last:
            return False
        return self.is_last or (self._ends.exit == last and unit <= last)

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
        for i in self._ends.own:
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

    def _own_modules(self) -> list[str]:
        anatomy = self._anatomy
        outside = [*(anatomy.embedding if self.is_first else ()), *self.head_names]
        return [*outside, *(name for i in self._ends.own for name in (anatomy.layers[i], *anatomy.beside(i)))]

    def _open(self, core: nn.Module) -> None:
        """Lets what is received in, and what the last layer puts out leave."""
        anatomy, layers = self._anatomy, [core.get_submodule(name) for name in self._anatomy.layers]
        if self._ends.entry is not None:
            places = anatomy.carried(self._ends.entry)
            for i in self._ends.own:
                extras = [(name, path) for name, found in places.items() for j, path in found if j == i]
                if i == self._ends.entry or extras:
                    self._inject(layers[i], anatomy.calls[i].hidden if i == self._ends.entry else None, extras)
            if self._ends.entry == anatomy.num_layers + 1:
                self._inject(core.get_submodule(anatomy.head[0]), anatomy.head_input, [])
        if self._ends.exit == anatomy.num_layers:
            self._end_after(layers[anatomy.num_layers - 1])

    def _inject(self, module: nn.Module, hidden: Path | None, extras: Sequence[tuple[str, Path]]) -> None:
        def injected(*args: Any, **kwargs: Any) -> Any:
            given: Any = (args, kwargs)
            if hidden is not None:
                given = with_leaf(given, hidden, self._passage.enter())
            for name, path in extras:
                given = with_leaf(given, path, self._passage.received_as(name))
            return self._run_layer(module, *given[0], **given[1])

        module._compiled_call_impl = injected  # around the module's hooks, which see what it is given

    def _end_after(self, layer: nn.Module) -> None:
        run = layer._compiled_call_impl or partial(self._run_layer, layer)
        call = self._anatomy.calls[-1]

        def ending(*args: Any, **kwargs: Any) -> Any:
            self._passage.captured[HIDDEN] = call.hidden_of(run(*args, **kwargs))
            raise EndReached

        layer._compiled_call_impl = ending  # around the layer's hooks, which may change what it returns

    def _run_layer(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self._compiled.get(module, module._call_impl) if self.compiles else module._call_impl
        return run(*args, **kwargs)
