"""The configuration of a Transformer-XL, new or as published checkpoints carry it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

MEM_INITS = ("masked", "zeros")


class TransfoXLConfig(PreTrainedConfig):
    """Everything that defines a Transformer-XL (Dai et al. 2019, arXiv 1901.02860); defaults: the WikiText-103 model.

    Args:
        vocab_size: number of tokens.
        cutoffs: first token id of every cluster after the shortlist; `[]` for a plain softmax. None: those of the
            WikiText-103 model, 20000, 40000, 200000.
        d_model: width of the hidden state, even (half of the positions are sines, half cosines).
        d_embed: width of the embedding of the first cluster.
        n_head: number of attention heads.
        d_head: width of a head; n_head * d_head may differ from d_model.
        d_inner: width of the feed-forward layers.
        div_val: cluster i has embeddings of width d_embed // div_val**i; 1 means one table for all clusters.
        pre_lnorm: layer norm before instead of after attention and feed-forward.
        n_layer: number of layers.
        mem_len: rows of memory per layer; 0 for none.
        clamp_len: distances beyond it count as this distance; 0 or less for no clamping.
        same_length: every position attends to exactly mem_len positions (no effect without memory).
        proj_share_all_but_first: sets `tie_projs`: all output projections but the first are those of the input.
        attn_type: 0, relative attention; the only one there is.
        sample_softmax: -1; sampled softmax isn't supported.
        adaptive: True; with `cutoffs=[]` adaptive and plain softmax are the same.
        dropout: on embeddings, positions, and the outputs of attention and feed-forward.
        dropatt: on attention probabilities.
        untie_r: every layer has relative biases of its own; False: one pair for all layers.
        init: `"normal"`, or `"uniform"` between -init_range and init_range.
        init_range: see `init`.
        init_std: standard deviation of new weights.
        proj_init_std: standard deviation of new projections.
        layer_norm_epsilon: epsilon of all layer norms.
        eos_token_id: end of sequence; None for none.
        pad_token_id: padding; None for none.
        bos_token_id: start of sequence; None for none.
        tie_word_embeddings: the output tables are the input tables.
        tie_projs: one bool per cluster: is the output projection that of the input? Wins over
            `proj_share_all_but_first`.
        mem_init: what the first segment finds in its memory. `"masked"`: nothing, so that results don't depend on
            how a text is cut into segments. `"zeros"`: zero rows that are attended to, as published models were
            trained; what a config file without this key (one from before v5) gets.

    Raises:
        ValueError: a value, or combination of values, that no Transformer-XL can have.
    """

    model_type = "transfo-xl"
    keys_to_ignore_at_inference = ["mems", "cache", "past_key_values", "losses"]
    attribute_map = {
        "n_token": "vocab_size",
        "hidden_size": "d_model",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size: int = 267735,
        cutoffs: list[int] | None = None,
        d_model: int = 1024,
        d_embed: int = 1024,
        n_head: int = 16,
        d_head: int = 64,
        d_inner: int = 4096,
        div_val: int = 4,
        pre_lnorm: bool = False,
        n_layer: int = 18,
        mem_len: int = 1600,
        clamp_len: int = 1000,
        same_length: bool = True,
        proj_share_all_but_first: bool = True,
        attn_type: int = 0,
        sample_softmax: int = -1,
        adaptive: bool = True,
        dropout: float = 0.1,
        dropatt: float = 0.0,
        untie_r: bool = True,
        init: str = "normal",
        init_range: float = 0.01,
        init_std: float = 0.02,
        proj_init_std: float = 0.01,
        layer_norm_epsilon: float = 1e-5,
        eos_token_id: int | None = 0,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        tie_projs: list[bool] | None = None,
        mem_init: str = "masked",
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.cutoffs = [20000, 40000, 200000] if cutoffs is None else list(cutoffs)
        self.d_model = d_model
        self.d_embed = d_embed
        self.n_head = n_head
        self.d_head = d_head
        self.d_inner = d_inner
        self.div_val = div_val
        self.pre_lnorm = pre_lnorm
        self.n_layer = n_layer
        self.mem_len = mem_len
        self.clamp_len = clamp_len
        self.same_length = same_length
        self.attn_type = attn_type
        self.sample_softmax = sample_softmax
        self.adaptive = adaptive
        self.dropout = dropout
        self.dropatt = dropatt
        self.untie_r = untie_r
        self.init = init
        self.init_range = init_range
        self.init_std = init_std
        self.proj_init_std = proj_init_std
        self.layer_norm_epsilon = layer_norm_epsilon
        self.mem_init = mem_init
        shared = [False] + [proj_share_all_but_first] * len(self.cutoffs)
        self.tie_projs = shared if tie_projs is None else list(tie_projs)
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        # Old configs say tie_weight; what they say about segment lengths was never part of the model.
        self.tie_word_embeddings = tie_word_embeddings and kwargs.pop("tie_weight", True)
        ext_len = kwargs.pop("ext_len", 0)
        kwargs.pop("tgt_len", None)
        self._check(ext_len)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> TransfoXLConfig:
        """As in the base class; a config file without `mem_init` is an old one, whose model attends to zero rows."""
        return super().from_dict({"mem_init": "zeros", **config_dict}, **kwargs)

    @property
    def cluster_starts(self) -> list[int]:
        """First token id of every cluster, the shortlist included."""
        return [0, *self.cutoffs]

    @property
    def table_sizes(self) -> list[int]:
        """Rows of every embedding table: one table for all clusters if div_val is 1, else one per cluster."""
        if self.div_val == 1:
            return [self.vocab_size]
        ends = [*self.cutoffs, self.vocab_size]
        return [end - start for start, end in zip(self.cluster_starts, ends, strict=True)]

    @property
    def table_widths(self) -> list[int]:
        """Width of every embedding table."""
        return [self.d_embed // self.div_val**i for i in range(len(self.table_sizes))]

    @property
    def has_projections(self) -> bool:
        """Whether embeddings are projected to d_model; always, if the clusters have different widths."""
        return self.div_val > 1 or self.d_embed != self.d_model

    def _check(self, ext_len: int) -> None:
        bounds = [*self.cluster_starts, self.vocab_size]
        if any(low >= high for low, high in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(
                f"cutoffs={self.cutoffs} must increase strictly between 0 and vocab_size={self.vocab_size}; "
                "use cutoffs=[] for a plain softmax"
            )
        if len(self.tie_projs) != len(self.cutoffs) + 1:
            raise ValueError(f"tie_projs={self.tie_projs} needs one entry per cluster, {len(self.cutoffs) + 1}")
        if self.div_val < 1 or min(self.table_widths) < 1:
            raise ValueError(
                f"div_val={self.div_val} leaves the last of {len(self.table_sizes)} clusters no width: "
                f"d_embed={self.d_embed} must be at least div_val**{len(self.table_sizes) - 1}"
            )
        if self.d_model % 2:
            raise ValueError(f"d_model={self.d_model} must be even: positions are half sines, half cosines")
        if self.mem_len < 0:
            raise ValueError(f"mem_len={self.mem_len} must be 0 (no memory) or more")
        if self.mem_init not in MEM_INITS:
            raise ValueError(f"mem_init={self.mem_init!r} isn't one of {', '.join(map(repr, MEM_INITS))}")
        if self.init not in ("normal", "uniform"):
            raise ValueError(f"init={self.init!r} isn't one of 'normal', 'uniform'")
        if self.attn_type != 0:
            raise ValueError(f"attn_type={self.attn_type} isn't supported; only 0, relative attention, is")
        if self.sample_softmax > 0:
            raise ValueError(f"sample_softmax={self.sample_softmax} isn't supported; only -1, no sampling, is")
        if ext_len:
            raise ValueError(f"ext_len={ext_len} isn't supported; only 0 is")
        if self.cutoffs and not self.adaptive:
            raise ValueError(f"adaptive=False contradicts cutoffs={self.cutoffs}; use cutoffs=[] for a plain softmax")
