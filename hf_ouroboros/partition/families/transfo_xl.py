"""Transformer-XL: adaptive embedding, layers with memories of their own, adaptive softmax that computes the loss."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedModelError
from ...models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel, TransfoXLMemory
from ...models.transfo_xl.context import attention_context, valid_keys
from ...models.transfo_xl.memory import first_memory, next_memory

VALID = "valid"


class TransfoXLFamily:
    """Runs a `TransfoXLLMHeadModel` layer by layer, as `TransfoXLModel.forward` does.

    Tables and projections of the embedding may be those of the softmax; a layer's memory stays with the layer.
    """

    model_class = TransfoXLLMHeadModel
    batch_keys = frozenset({"input_ids", "attention_mask"})
    computes_loss = True

    def check(self, model: TransfoXLLMHeadModel) -> None:
        """Refuses relative biases that all layers share: they would belong to every stage, each with another delay."""
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

    def head(self, model: TransfoXLLMHeadModel) -> list[str]:
        """Last dropout and softmax."""
        return ["transformer.final_drop", "crit"]

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

    def embed(self, stage: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Adaptive embedding, then dropout: [batch, time, d_model]."""
        hidden = stage.get_submodule("transformer.word_emb")(batch["input_ids"])
        return stage.get_submodule("transformer.drop")(hidden)

    def run_layers(
        self,
        stage: nn.Module,
        hidden: torch.Tensor,
        batch: dict[str, torch.Tensor],
        memory: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Layers that attend to their own inputs of the segment before; `memory` has them by layer, and which count."""
        layers, config = stage.layers, stage.config
        if memory:
            before = TransfoXLMemory(tuple(memory[name] for name in layers), memory.get(VALID))
        else:
            before = first_memory(config, len(hidden), len(layers), hidden.dtype, hidden.device)
        valid = valid_keys(hidden, before.rows, before.valid, batch.get("attention_mask"))
        context = attention_context(config, hidden, before.rows, valid, training=stage.training)
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

    def loss(self, stage: nn.Module, hidden: torch.Tensor, targets: dict[str, Any]) -> torch.Tensor:
        """The softmax's loss, for which it never builds an array over the vocabulary."""
        hidden = stage.get_submodule("transformer.final_drop")(hidden)
        return stage.get_submodule("crit")(hidden, **targets)[0]

    def remembers(self, config: TransfoXLConfig) -> bool:
        """Whether there is a memory."""
        return config.mem_len > 0

    def evaluation_config(self, config: TransfoXLConfig, **options: int) -> TransfoXLConfig:
        """A copy with another `mem_len` or `clamp_len`."""
        changed = copy.copy(config)
        for name, value in options.items():
            setattr(changed, name, value)
        return changed
