"""Transformer-XL: adaptive embedding, layers with memories of their own, adaptive softmax that computes the loss.

It is special in two ways, so its stages run its modules themselves instead of its forward: a layer's memory stays with
the layer, and the softmax computes the loss without an array over the vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ...errors import UnsupportedModelError
from ...models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel, TransfoXLMemory, TransfoXLModel
from ...models.transfo_xl.context import attention_context, valid_keys
from ...models.transfo_xl.recurrent_memory import first_memory, next_memory
from ..anatomy import HIDDEN
from ..one_call import OneCall
from ..shadow import shadow
from ..stages import Boundary, Finish, Memory, Stage
from ..units import StageSpan, Unit
from .base import Family

VALID = "valid"
OUTPUTS = ("output_attentions", "output_hidden_states", "use_cache", "mems")
TARGETS = ("labels", "shift_labels", "num_items_in_batch")


class TransfoXLFamily(Family[TransfoXLLMHeadModel, TransfoXLConfig]):
    """Tables and projections of the embedding may be those of the softmax."""

    computes_loss = True
    draws_in_turn = False  # dropout of the positions, which all layers share, is drawn by every stage

    def accepts(self, model: nn.Module) -> bool:
        """A `TransfoXLLMHeadModel`."""
        return isinstance(model, TransfoXLLMHeadModel)

    def check(self, model: TransfoXLLMHeadModel) -> None:
        """Refuses relative biases that all layers share: they would belong to every stage, each with another delay.

        And a forward of a subclass, which stages would not run.
        """
        for module, known in ((model, TransfoXLLMHeadModel), (model.transformer, TransfoXLModel)):
            if getattr(module.forward, "__func__", None) is not known.forward:
                raise UnsupportedModelError(
                    f"{type(module).__name__} has a forward of its own, which stages of a Transformer-XL don't run; use "
                    f"{known.__name__} and a compute_loss_func"
                )
        if not model.config.untie_r:
            raise UnsupportedModelError(
                "config.untie_r=False: all layers share one pair of relative biases, which can't belong to several "
                "stages. Call model.untie_r_biases() first, which gives every layer a copy: the same function, with "
                f"{2 * model.config.n_head * model.config.d_head} more parameters per layer; or train with untie_r=True"
            )

    def embedding(self, model: TransfoXLLMHeadModel) -> tuple[str, ...]:
        """Names of the embedding modules."""
        return ("transformer.word_emb", "transformer.drop")

    def layers(self, model: TransfoXLLMHeadModel) -> list[str]:
        """Names of the layers."""
        return [f"transformer.layers.{i}" for i in range(len(model.transformer.layers))]

    def head(self, model: TransfoXLLMHeadModel) -> list[tuple[str, ...]]:
        """Last dropout and softmax."""
        return [("transformer.final_drop",), ("crit",)]

    def make_stage(self, model: TransfoXLLMHeadModel, units: Sequence[Unit], span: StageSpan, num_stages: int) -> Stage:
        """A stage that runs its modules one after the other."""
        return TransfoXLStage(model, self, units, span, num_stages)

    def cost(self, model: TransfoXLLMHeadModel, name: str) -> float | None:
        """Of the adaptive softmax: the words of a cluster cost something only where the target is one of them.

        By Zipf's law, token r of a vocabulary sorted by frequency has a probability of about 1 / (r ln V).
        """
        config = model.config
        if name != "crit" or not config.cutoffs:
            return None
        bounds = [*config.cluster_starts, config.vocab_size]
        clusters = list(zip(bounds, bounds[1:], strict=False))
        widths = config.table_widths if config.div_val > 1 else config.table_widths * len(clusters)
        total = float(len(config.cutoffs) * config.d_embed)
        for (start, end), width in zip(clusters, widths, strict=True):
            share = math.log(end / start) / math.log(config.vocab_size) if start else 1.0
            total += share * width * (end - start + (config.d_model if config.has_projections else 0))
        return total

    def remembers(self, config: TransfoXLConfig) -> bool:
        """Whether there is a memory."""
        return config.mem_len > 0

    def evaluation_config(self, config: TransfoXLConfig, **options: int) -> TransfoXLConfig:
        """A copy with another `mem_len` or `clamp_len`."""
        changed = copy.copy(config)
        for name, value in options.items():
            setattr(changed, name, value)
        return changed


class TransfoXLStage(Stage):
    """A run of units of a `TransfoXLLMHeadModel`, which it runs as `TransfoXLModel.forward` does."""

    config: TransfoXLConfig
    batch_keys = frozenset({"input_ids", "attention_mask"})
    draws = False  # but for dropout modules, which are found by themselves

    def __init__(self, model: PreTrainedModel, family: Family, units: Sequence[Unit], span: StageSpan, num_stages: int):
        super().__init__(model.config, family, units, span, num_stages)
        own = [name for unit in units[span.start : span.stop] for name in unit.modules]
        whole = shadow(model)  # one shadow, so that modules that share something still do
        for name in own:
            _attach(self, name, whole.get_submodule(name))

    def forward(
        self,
        batch: dict[str, torch.Tensor],
        received: Boundary | None = None,
        memory: Memory | None = None,
        finish: Finish | None = None,
    ) -> Boundary | Any:
        """See `Stage.forward`."""
        if received is not None:
            hidden = received[HIDDEN]
        else:
            hidden = self.get_submodule("transformer.drop")(
                self.get_submodule("transformer.word_emb")(batch["input_ids"])
            )
        if self.layer_names:
            hidden = self._run_layers(hidden, batch, memory)
        if self.is_last:
            call = OneCall(partial(self._call, hidden), batch, self.batch_keys, frozenset(OUTPUTS), alone=False)
            if finish is not None:
                return finish(call)
            output: Any = call(**batch)
            return output.logits
        for name in self.head_names:
            hidden = self.get_submodule(name)(hidden)
        return {HIDDEN: hidden}

    def _call(self, hidden: torch.Tensor, inputs: Mapping[str, Any]) -> CausalLMOutput:
        """What is left of a call of the model: the loss where there are labels, else the log-probabilities."""
        targets = {key: inputs[key] for key in TARGETS if inputs.get(key) is not None}
        *before, head = [self.get_submodule(name) for name in self.head_names]
        for module in before:
            hidden = module(hidden)
        if targets.keys() & {"labels", "shift_labels"}:
            return CausalLMOutput(loss=head(hidden, **targets)[0])
        return CausalLMOutput(logits=head(hidden))

    def _run_layers(self, hidden: torch.Tensor, batch: dict[str, torch.Tensor], memory: Memory | None) -> torch.Tensor:
        """Layers that attend to their own inputs of the segment before; `memory` has them by layer, and which count."""
        layers, config = self.layers, self.config
        if memory:
            before = TransfoXLMemory(tuple(memory[name] for name in layers), memory.get(VALID))
        else:
            before = first_memory(config, len(hidden), len(layers), hidden.dtype, hidden.device)
        valid = valid_keys(hidden, before.rows, before.valid, batch.get("attention_mask"))
        context = attention_context(config, hidden, before.rows, valid, training=self.training)
        inputs = []
        for layer, state in zip(layers.values(), before, strict=True):
            inputs.append(hidden)
            hidden, _ = layer(hidden, context, state)
        if memory is not None:
            after = next_memory(before, inputs, valid, config.mem_len)
            memory |= zip(layers, after, strict=True)
            if after.valid is not None:
                memory[VALID] = after.valid
        return hidden


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(leaf, module)
