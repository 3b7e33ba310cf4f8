"""Transformer-XL: the base model and the language model (Dai et al. 2019, arXiv 1901.02860).

Both are made of pieces that also run alone, for instance as stages of a pipeline. With `memory` those of the stage's
own layers, a stage needs nothing of the others but the hidden state:

    hidden = model.transformer.drop(model.transformer.word_emb(input_ids))             # [batch, time, d_model]
    valid = valid_keys(hidden, memory.rows, memory.valid, attention_mask)              # on every stage
    context = attention_context(config, hidden, memory.rows, valid, training=training)
    for layer, state in zip(own_layers, memory):
        inputs.append(hidden)                                                          # a layer's input is its memory
        hidden, _ = layer(hidden, context, state)
    memory = next_memory(memory, inputs, valid, config.mem_len)
    loss, losses = model.crit(model.transformer.final_drop(hidden), labels=labels)     # or log-probabilities
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers.generation import GenerationMixin

from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax

# Of a model with code, early 5.x releases copy only the files that are imported here.
from .attention import RelativeAttention  # noqa: F401
from .base import TransfoXLPreTrainedModel
from .cache import CACHE_NAME, TransfoXLCache
from .configuration_transfo_xl import TransfoXLConfig
from .context import attention_context, valid_keys
from .layer import TransfoXLLayer
from .outputs import TransfoXLLMHeadModelOutput, TransfoXLModelOutput
from .recurrent_memory import TransfoXLMemory, checked_memory, first_memory, next_memory


class TransfoXLModel(TransfoXLPreTrainedModel):
    """Embeddings and layers, without the softmax.

    Args:
        config: see TransfoXLConfig.
    """

    def __init__(self, config: TransfoXLConfig):
        super().__init__(config)
        self.word_emb = AdaptiveEmbedding(config)
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransfoXLLayer(config) for _ in range(config.n_layer))
        self.final_drop = nn.Dropout(config.dropout)
        if not config.untie_r:
            self.r_w_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))
            self.r_r_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))
        self.post_init()

    def get_input_embeddings(self) -> AdaptiveEmbedding:
        """The adaptive embedding."""
        return self.word_emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the adaptive embedding, by another one."""
        self.word_emb = cast(AdaptiveEmbedding, value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        mems: TransfoXLMemory | Sequence[torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: TransfoXLCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: TransfoXLCache | None = None,
    ) -> TransfoXLModelOutput | tuple:
        """Runs a segment.

        Args:
            input_ids: int64 [batch, time].
            mems: memory of the segment before, as the model returned it; or one tensor [batch, rows, d_model] per
                layer. None: the text starts here, see `mem_init` of the configuration.
            attention_mask: [batch, time], 0 at padding, on either side; with a cache [batch, at least time], of which
                the last `time` columns count. Padding counts in distances.
            inputs_embeds: [batch, time, d_model] instead of input_ids; not scaled.
            cache: of the tokens before.
            use_cache: True: memory in projected form, `cache`, for inference; False: no memory is returned; None:
                `mems`, unless a cache is given.
            output_attentions: return the attention probabilities; this computes attention step by step ("eager").
            output_hidden_states: return the inputs of all layers.
            return_dict: False for a tuple.
            past_key_values: `cache`, as transformers called it before 5.24.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; mems of other shapes, or together with a
                filled cache; a cache under both of its names; a mask of another shape; a cache under gradient checkpointing.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.drop(self.word_emb(input_ids) if inputs_embeds is None else inputs_embeds)

        if cache is not None and past_key_values is not None:
            raise ValueError("give cache or past_key_values, not both: they are two names of one argument")
        cache = past_key_values if cache is None else cache
        cache = TransfoXLCache(self.config) if use_cache and cache is None else cache
        memory = self._memory(hidden, mems, cache)
        if memory is not None:
            rows, memory_valid = memory.rows, memory.valid
        else:
            assert cache is not None  # which has it
            rows, memory_valid = cache.rows, cache.valid
        valid = valid_keys(hidden, rows, memory_valid, attention_mask)
        biases = None if self.config.untie_r else (self.r_w_bias, self.r_r_bias)
        context = attention_context(
            self.config, hidden, rows, valid, biases, self.training, cache is not None, output_attentions
        )
        inputs, attentions = [], []
        for i, layer in enumerate(self.layers):
            inputs.append(hidden)
            state = None if memory is None else memory[i]
            hidden, probabilities = layer(hidden, context, state, None if cache is None else cache.layers[i])
            attentions.append(probabilities)
        hidden = self.final_drop(hidden)

        if cache is not None:
            cache.record(hidden.shape[1], valid)
        after = None
        if memory is not None and cache is None and use_cache is not False and self.config.mem_len > 0:
            after = next_memory(memory, inputs, valid, self.config.mem_len)
        output = TransfoXLModelOutput(
            last_hidden_state=hidden,
            mems=after,
            **{CACHE_NAME: cache},
            hidden_states=(*inputs, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    def _memory(
        self,
        hidden: torch.Tensor,
        mems: TransfoXLMemory | Sequence[torch.Tensor] | None,
        cache: TransfoXLCache | None,
    ) -> TransfoXLMemory | None:
        """What the segment attends to besides itself; None if the cache has it."""
        recomputed = self.training and any(layer.gradient_checkpointing for layer in self.layers)
        if cache is not None and recomputed and torch.is_grad_enabled():
            raise ValueError("gradient checkpointing would fill the cache twice; use mems instead of use_cache=True")
        if cache is not None and cache.seen_tokens:
            if mems is not None:
                raise ValueError("give mems or a filled cache, not both: each is the whole memory")
            return None
        if mems is not None:
            return checked_memory(mems, self.config, hidden.shape[0])
        return first_memory(self.config, hidden.shape[0], len(self.layers), hidden.dtype, hidden.device)


class TransfoXLLMHeadModel(TransfoXLPreTrainedModel, GenerationMixin):
    """The language model: base model and adaptive softmax.

    Args:
        config: see TransfoXLConfig.
    """

    # Patterns for saving; which of them are tied is in get_expanded_tied_weights_keys.
    _tied_weights_keys = {
        r"crit\.out_layers\.\d+\.weight": r"transformer\.word_emb\.emb_layers\.\d+\.weight",
        r"crit\.out_projs\.\d+": r"transformer\.word_emb\.emb_projs\.\d+",
    }
    accepts_loss_kwargs = True

    def __init__(self, config: TransfoXLConfig):
        super().__init__(config)
        self.transformer = TransfoXLModel(config)
        self.crit = AdaptiveSoftmax(config)
        # Trainer then counts the labels that are left after shifting.
        self.loss_type = "ForCausalLM"
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Every tied parameter and the one it is tied to, by name; projections are tied apart from tables."""
        config, tied = self.config, {}
        if config.tie_word_embeddings:
            for i in range(len(config.table_sizes)):
                tied[f"crit.out_layers.{i}.weight"] = f"transformer.word_emb.emb_layers.{i}.weight"
        if config.has_projections:
            for i, tie in enumerate(config.tie_projs):
                if tie:
                    tied[f"crit.out_projs.{i}"] = f"transformer.word_emb.emb_projs.{i if config.div_val > 1 else 0}"
        return tied

    def tie_weights(self, missing_keys: set[str] | None = None, *args: Any, **kwargs: Any) -> None:
        """As in the base class; of a checkpoint that holds both sides of a tie, as `.bin` files do, equal ones are tied.

        Early 5.x releases leave them apart.
        """
        if missing_keys is not None:
            for target, source in self.all_tied_weights_keys.items():
                ends = self.get_parameter(target), self.get_parameter(source)
                if not missing_keys & {target, source} and ends[0].device.type != "meta" and torch.equal(*ends):
                    missing_keys.add(target)
        super().tie_weights(missing_keys, *args, **kwargs)

    def untie_r_biases(self) -> None:
        """Turns a model whose layers share their relative biases (`untie_r=False`) into one where each has its own.

        Each layer gets a copy: the same function, which training is free to take apart. Stages need it. To be called
        before an optimizer is made; does nothing to a model with `untie_r=True`.
        """
        if self.config.untie_r:
            return
        for name in ("r_w_bias", "r_r_bias"):
            shared = self.transformer.get_parameter(name)
            for layer in self.transformer.layers:
                own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                setattr(layer.dec_attn, name, own)
            delattr(self.transformer, name)
        self.config.untie_r = True

    def get_output_embeddings(self) -> None:
        """None: there is no single output table."""
        return None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        mems: TransfoXLMemory | Sequence[torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: TransfoXLCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_logits: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: TransfoXLCache | None = None,
        **loss_kwargs: torch.Tensor | int | None,
    ) -> TransfoXLLMHeadModelOutput | tuple:
        """Runs a segment; arguments that aren't said here as in `TransfoXLModel.forward`.

        Args:
            labels: int64 [batch, time], -100 where ignored; shifted inside: position t is predicted from t-1.
            logits_to_keep: log-probabilities of the last positions only; 0 for all.
            return_logits: None: without labels, and in evaluation mode; with a large vocabulary False saves memory.
            loss_kwargs: `shift_labels`, the labels already shifted, for consecutive segments, where shifting inside
                would lose the last target of each; wins over `labels`. `num_items_in_batch`, what the summed loss is
                divided by; default: the number of labels that count. Not in the signature, because Trainer takes
                every parameter with "label" in its name for one that evaluation can't do without.

        Raises:
            TypeError: other keyword arguments.
        """
        if unknown := loss_kwargs.keys() - {"shift_labels", "num_items_in_batch"}:
            raise TypeError(f"forward() got unexpected keyword arguments: {', '.join(sorted(unknown))}")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        output = self.transformer(
            input_ids=input_ids,
            mems=mems,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=cache,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden = output.last_hidden_state
        has_labels = labels is not None or loss_kwargs.get("shift_labels") is not None
        loss = losses = logits = None
        if has_labels:
            loss, losses = self.crit(hidden, labels, **loss_kwargs)
        if return_logits or (return_logits is None and not (has_labels and self.training)):
            logits = self.crit(hidden[:, -logits_to_keep:])
        result = TransfoXLLMHeadModelOutput(
            loss=loss,
            logits=logits,
            losses=losses,
            mems=output.mems,
            **{CACHE_NAME: output.cache},
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if return_dict else result.to_tuple()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: the model makes its own cache."""
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        mems: TransfoXLMemory | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in the base class; `mems` go to the first step only, after which the cache has them."""
        if self.config.mem_len == 0:
            # A cache without memory would leave a new token alone; the text is read again instead.
            kwargs |= {CACHE_NAME: None, "use_cache": False, "next_sequence_length": None}
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs.pop("cache_position", None)  # early 5.x releases
        if kwargs.get(CACHE_NAME) is None:
            inputs["mems"] = mems
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, **kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """As in the base class, which repeats tensors for beams; `mems` too."""
        if kwargs.get("mems") is not None:
            kwargs["mems"] = kwargs["mems"].repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(expand_size, *args, **kwargs)  # type: ignore[misc]
