"""GPT-2: token and position embeddings, blocks, final norm, head (tied to the token embedding or not)."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import create_causal_mask

from ...errors import UnsupportedModelError, UnsupportedOptionError


class GPT2Family:
    """Runs a `GPT2LMHeadModel` block by block, as `GPT2Model.forward` does."""

    model_class = GPT2LMHeadModel
    batch_keys = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})
    computes_loss = False

    def check(self, model: GPT2LMHeadModel) -> None:
        """Refuses cross attention."""
        if model.config.add_cross_attention:
            raise UnsupportedModelError("GPT-2 with config.add_cross_attention=True can't be split into stages")

    def embedding(self, model: GPT2LMHeadModel) -> tuple[str, ...]:
        """Names of the embedding modules."""
        return ("transformer.wte", "transformer.wpe", "transformer.drop")

    def layers(self, model: GPT2LMHeadModel) -> list[str]:
        """Names of the blocks."""
        return [f"transformer.h.{i}" for i in range(len(model.transformer.h))]

    def head(self, model: GPT2LMHeadModel) -> list[str]:
        """Final norm and output projection."""
        return ["transformer.ln_f", "lm_head"]

    def cost(self, model: GPT2LMHeadModel, name: str) -> None:
        """None: every matrix is multiplied with every token."""

    def embed(self, stage: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Token + position (+ token type) embeddings, then dropout: [batch, time, width]."""
        ids = batch["input_ids"]
        wte = stage.get_submodule("transformer.wte")
        hidden = wte(ids) + stage.get_submodule("transformer.wpe")(_position_ids(ids, batch))
        if "token_type_ids" in batch:
            hidden = hidden + wte(batch["token_type_ids"])
        return stage.get_submodule("transformer.drop")(hidden)

    def run_layers(
        self, stage: nn.Module, hidden: torch.Tensor, batch: dict[str, torch.Tensor], memory: None = None
    ) -> torch.Tensor:
        """Blocks under the causal mask, built from the 2-D attention mask or packed position ids on every stage."""
        # Without given position ids nothing is packed; looking for it would cost a device synchronization per stage.
        position_ids = batch.get("position_ids")
        mask = create_causal_mask(
            config=stage.config,
            inputs_embeds=hidden,
            attention_mask=batch.get("attention_mask"),
            position_ids=position_ids,
            **_extra_mask_arguments(hidden),
        )
        for block in stage.layers.values():
            output = block(hidden, attention_mask=mask, use_cache=False, position_ids=position_ids)
            hidden = output[0] if isinstance(output, tuple) else output  # a tuple in some releases of transformers
        return hidden

    def remembers(self, config: GPT2Config) -> bool:
        """False: every micro-batch stands for itself."""
        return False

    def evaluation_config(self, config: GPT2Config, **options: int) -> GPT2Config:
        """Refuses: there is no memory to configure."""
        raise UnsupportedOptionError(
            f"{', '.join(f'eval_{name}={value}' for name, value in options.items())}: a GPT-2 has no memory that carries "
            "over from segment to segment; leave it out (models that do: Transformer-XL)"
        )


def _position_ids(sample: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if "position_ids" in batch:
        return batch["position_ids"]
    return torch.arange(sample.shape[1], device=sample.device).unsqueeze(0)


_MASK_PARAMETERS = inspect.signature(create_causal_mask).parameters


def _extra_mask_arguments(hidden: torch.Tensor) -> dict:
    """No cache, whose name has changed in 5.24; early 5.x releases of transformers require `cache_position`."""
    arguments: dict = {"cache" if "cache" in _MASK_PARAMETERS else "past_key_values": None}
    parameter = _MASK_PARAMETERS.get("cache_position")
    if parameter is not None and parameter.default is inspect.Parameter.empty:
        arguments["cache_position"] = torch.arange(hidden.shape[1], device=hidden.device)
    return arguments
