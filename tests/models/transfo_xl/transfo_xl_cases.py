"""Small Transformer-XL models of every kind, and the formulas of the paper written out in loops."""

from __future__ import annotations

import math
from typing import Any

import torch

from hf_ouroboros.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel

VOCABULARY = 29
BASE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    d_model=8,
    d_embed=8,
    n_head=2,
    d_head=4,
    d_inner=12,
    n_layer=2,
    mem_len=6,
    div_val=1,
    cutoffs=[],
    clamp_len=-1,
    same_length=False,
    dropout=0.0,
)
CUT = [8, 20]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared_biases": dict(untie_r=False),
    "narrow": dict(d_embed=6),
    "evaluation": dict(same_length=True, clamp_len=4),
    "odd_heads_before": dict(pre_lnorm=True, n_head=3, d_head=3),
    "cut": dict(cutoffs=CUT),
    "cut_narrow": dict(cutoffs=CUT, d_embed=6),
    "cut_narrow_untied_projections": dict(cutoffs=CUT, d_embed=6, proj_share_all_but_first=False),
    "wikitext": dict(cutoffs=CUT, div_val=2, same_length=True, clamp_len=4),
    "divided_untied_projections": dict(cutoffs=CUT, div_val=2, proj_share_all_but_first=False),
    "divided_untied": dict(cutoffs=CUT, div_val=2, tie_word_embeddings=False),
    "divided_uncut": dict(div_val=2),
    "untied_narrow": dict(d_embed=6, tie_word_embeddings=False),
}


def tiny_config(**overrides: Any) -> TransfoXLConfig:
    """A configuration of a few hundred parameters."""
    return TransfoXLConfig(**{**BASE, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> TransfoXLLMHeadModel:
    """A model in evaluation mode whose weights are so large that every term matters."""
    model = TransfoXLLMHeadModel(tiny_config(**overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.35)
            if name.endswith("layer_norm.weight"):
                parameter.add_(1.0)
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random token ids; a batch of enough tokens has some of every cluster."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def log_probabilities_by_loops(
    model: TransfoXLLMHeadModel, ids: list[int], memory: list[torch.Tensor]
) -> tuple[list[list[float]], list[torch.Tensor]]:
    """The paper's formulas for one text, without a single batched operation.

    Args:
        model: any.
        ids: the segment.
        memory: per layer the rows of memory, [rows, d_model], all of which may be attended to.

    Returns:
        Log-probabilities [time][vocabulary], and the inputs of all layers.
    """
    c, p = model.config, {n: t.detach().double() for n, t in model.named_parameters(remove_duplicate=False)}
    starts, ends = [0, *c.cutoffs], [*c.cutoffs, c.vocab_size]

    def cluster_of(word: int) -> int:
        return next(i for i, end in enumerate(ends) if word < end)

    def embedding(word: int) -> torch.Tensor:
        i = cluster_of(word) if c.div_val > 1 else 0
        row = word - starts[i] if c.div_val > 1 else word
        vector = p[f"transformer.word_emb.emb_layers.{i}.weight"][row]
        projection = p.get(f"transformer.word_emb.emb_projs.{i}")
        return (vector if projection is None else projection @ vector) * math.sqrt(c.d_model)

    def position(distance: int) -> torch.Tensor:
        distance = min(distance, c.clamp_len) if c.clamp_len > 0 else distance
        angles = [distance / 10000 ** (i / c.d_model) for i in range(0, c.d_model, 2)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)

    def norm(name: str, vector: torch.Tensor) -> torch.Tensor:
        centred = vector - vector.mean()
        scaled = centred / (centred.square().mean() + c.layer_norm_epsilon).sqrt()
        return scaled * p[f"{name}.layer_norm.weight"] + p[f"{name}.layer_norm.bias"]

    def attention(name: str, rows: list[torch.Tensor], i: int) -> torch.Tensor:
        raw = rows[i]
        if c.pre_lnorm:
            rows = [norm(name, row) for row in rows]
        inner = c.n_head * c.d_head
        w_q, w_k, w_v = p[f"{name}.qkv_net.weight"].split(inner)
        visible = [j for j in range(i + 1) if not (c.same_length and c.mem_len and i - j >= c.mem_len)]
        result = torch.zeros(inner, dtype=torch.float64)
        for head in range(c.n_head):
            part = slice(head * c.d_head, (head + 1) * c.d_head)
            biases = "transformer" if not c.untie_r else name
            q = (w_q @ rows[i])[part]
            scores = []
            for j in visible:
                k = (w_k @ rows[j])[part]
                r = (p[f"{name}.r_net.weight"] @ position(i - j))[part]
                content = (q + p[f"{biases}.r_w_bias"][head]) @ k
                scores.append((content + (q + p[f"{biases}.r_r_bias"][head]) @ r) / math.sqrt(c.d_head))
            weights = torch.stack(scores).softmax(0)
            result[part] = sum(w * (w_v @ rows[j])[part] for w, j in zip(weights, visible, strict=True))
        output = raw + p[f"{name}.o_net.weight"] @ result
        return output if c.pre_lnorm else norm(name, output)

    def feed_forward(name: str, vector: torch.Tensor) -> torch.Tensor:
        first, second = (p[f"{name}.CoreNet.{i}.weight"] for i in (0, 3))
        inner = first @ (norm(name, vector) if c.pre_lnorm else vector) + p[f"{name}.CoreNet.0.bias"]
        output = vector + second @ inner.clamp(min=0) + p[f"{name}.CoreNet.3.bias"]
        return output if c.pre_lnorm else norm(name, output)

    def words(hidden: torch.Tensor) -> list[float]:
        def scores(cluster: int) -> list[float]:
            table = cluster if c.div_val > 1 else 0
            first = 0 if c.div_val > 1 else starts[cluster]
            projection = p.get(f"crit.out_projs.{cluster}")
            vector = hidden if projection is None else projection.T @ hidden
            weight, bias = p[f"crit.out_layers.{table}.weight"], p[f"crit.out_layers.{table}.bias"]
            result = [
                float(weight[first + w] @ vector + bias[first + w]) for w in range(ends[cluster] - starts[cluster])
            ]
            if cluster == 0 and c.cutoffs:
                result += (p["crit.cluster_weight"] @ vector + p["crit.cluster_bias"]).tolist()
            total = math.log(sum(math.exp(score) for score in result))
            return [score - total for score in result]

        head = scores(0)
        result = head[: ends[0]]
        for cluster in range(1, len(starts)):
            result += [head[ends[0] + cluster - 1] + score for score in scores(cluster)]
        return result

    hidden = [embedding(word) for word in ids]
    inputs = []
    for layer in range(c.n_layer):
        inputs.append(torch.stack(hidden))
        name, rows = f"transformer.layers.{layer}", [*memory[layer].double(), *hidden]
        attended = [attention(f"{name}.dec_attn", rows, len(memory[layer]) + i) for i in range(len(ids))]
        hidden = [feed_forward(f"{name}.pos_ff", vector) for vector in attended]
    return [words(vector) for vector in hidden], inputs
