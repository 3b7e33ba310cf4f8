"""What both models share: names, initialisation, resizing."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from .configuration_transfo_xl import TransfoXLConfig


class TransfoXLPreTrainedModel(PreTrainedModel):
    """Base class of both models."""

    config_class = TransfoXLConfig
    config: TransfoXLConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransfoXLLayer"]
    # Positions are computed on the fly, and relative biases that all layers share are stored once.
    _keys_to_ignore_on_load_unexpected = [r"pos_emb\.inv_freq$", r"dec_attn\.r_[rw]_bias$"]

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises the direct parameters of a module.

        transformers leaves out modules of foreign packages that have none, so every parameter has to be
        initialised by the module that holds it; projections by their nn.ParameterList.
        """
        if isinstance(module, nn.LayerNorm):
            init.normal_(module.weight, 1.0, self.config.init_std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.ParameterList):
            for projection in module:
                self._init_weight(projection, self.config.proj_init_std)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            self._init_weight(module.weight)
            if (bias := getattr(module, "bias", None)) is not None:
                init.zeros_(bias)
        elif isinstance(module, AdaptiveSoftmax) and self.config.cutoffs:
            self._init_weight(module.cluster_weight)
            init.zeros_(module.cluster_bias)
        elif hasattr(module, "r_w_bias"):  # an attention, or with untie_r=False the model
            for name in ("r_w_bias", "r_r_bias"):
                self._init_weight(module.get_parameter(name))

    def _init_weight(self, weight: torch.Tensor, std: float | None = None) -> None:
        if self.config.init == "uniform":
            init.uniform_(weight, -self.config.init_range, self.config.init_range)
        else:
            init.normal_(weight, 0.0, self.config.init_std if std is None else std)

    def resize_token_embeddings(  # type: ignore[override]  # transformers has nn.Embedding in mind
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> AdaptiveEmbedding:
        """Appends or removes tokens at the end of the vocabulary, that is in the last cluster.

        Arguments as in the base class; returns the input embeddings.

        Raises:
            ValueError: nothing would remain of the last cluster.
        """
        embeddings = cast(AdaptiveEmbedding, self.get_input_embeddings())
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embeddings
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size += -size % pad_to_multiple_of
        if size <= self.config.cluster_starts[-1]:
            raise ValueError(f"{size} tokens are too few: cutoffs={self.config.cutoffs}, and no cluster may be empty")
        rows = size - (self.config.cluster_starts[-1] if self.config.div_val > 1 else 0)
        head = getattr(self, "crit", None)
        if head is not None:
            # Before the embeddings: a table tied to them would already have the new size, and keep the old bias.
            head.out_layers[-1] = self._get_resized_lm_head(head.out_layers[-1], rows, mean_resizing=mean_resizing)
        embeddings.emb_layers[-1] = self._get_resized_embeddings(
            cast(nn.Embedding, embeddings.emb_layers[-1]), rows, mean_resizing=mean_resizing
        )
        self.config.vocab_size = size
        self.tie_weights()
        return embeddings
