"""Checkpoints of the original PyTorch repository (kimiyoung/transformer-xl): other names, clusters from the end.

Its `model.pt` is a whole pickled module, read with inert stubs for its classes; state dicts are read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .errors import ConversionError
from .safe_pickle import Stub

State = dict[str, torch.Tensor]
# What a state dict can't tell, and no default would be right for.
UNTOLD = ("mem_len", "clamp_len", "same_length", "pre_lnorm")


MOST_DEPTH, MOST_MODULES = 20, 100_000


def module_state(module: Stub, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Names and parameters of the stub of a pickled module, as its `state_dict` would give them.

    Raises:
        ConversionError: modules hold each other without end.
    """
    left = [MOST_MODULES]
    yield from _module_state(module, prefix, left)


def _module_state(module: Stub, prefix: str, left: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    left[0] -= 1
    if left[0] < 0 or prefix.count(".") > MOST_DEPTH:
        raise ConversionError("it has modules that hold each other without end")
    attributes = module.__dict__
    for name, parameter in attributes.get("_parameters", {}).items():
        if parameter is not None:
            yield prefix + name, parameter.detach()
    for name, child in attributes.get("_modules", {}).items():
        if child is not None:
            yield from _module_state(child, f"{prefix}{name}.", left)


def is_original(state: State) -> bool:
    """Whether the names are those of the original repository, whose model has no `transformer.` in front."""
    return "crit.out_layers.0.bias" in state and not any(name.startswith("transformer.") for name in state)


def renamed(state: State) -> State:
    """The parameters under our names, cluster 1 first: the original numbers its clusters from the end."""
    result = {}
    for name, tensor in state.items():
        if name in ("crit.cluster_weight", "crit.cluster_bias"):
            tensor = tensor.flip(0)
        result[name if name.startswith("crit.") else f"transformer.{name}"] = tensor
    return result


def module_config(module: Stub) -> dict[str, Any]:
    """The configuration that the attributes of a pickled module tell."""
    own = module.__dict__
    parts = own["_modules"]
    layer = parts["layers"].__dict__["_modules"]["0"].__dict__["_modules"]["dec_attn"]
    told: dict[str, Any] = {
        name: own[name] for name in ("mem_len", "clamp_len", "same_length", "attn_type", "ext_len") if name in own
    }
    told["same_length"] = bool(told.get("same_length", False))
    told["pre_lnorm"] = bool(layer.__dict__["pre_lnorm"])
    # The list there ends with the size of the vocabulary.
    told["cutoffs"] = list(parts["word_emb"].__dict__["cutoffs"])[:-1]
    told["dropout"] = parts["drop"].__dict__["p"]
    told["dropatt"] = layer.__dict__["_modules"]["dropatt"].__dict__["p"]
    return told


def inferred_config(state: State, told: dict[str, Any]) -> dict[str, Any]:
    """The configuration of renamed parameters.

    Args:
        state: parameters under our names.
        told: what is known besides: attributes of the module, or given by the caller; wins over what is inferred.

    Raises:
        ConversionError: something that parameters can't tell isn't told; the message lists what.
    """
    tables = _numbered(state, "transformer.word_emb.emb_layers.{}.weight")
    projections = _numbered(state, "transformer.word_emb.emb_projs.{}")
    layer = "transformer.layers.0."
    untie_r = "transformer.r_w_bias" not in state
    n_head, d_head = state[layer + "dec_attn.r_w_bias" if untie_r else "transformer.r_w_bias"].shape
    config: dict[str, Any] = {
        "vocab_size": sum(len(table) for table in tables),
        "d_model": state[layer + "dec_attn.o_net.weight"].shape[0],
        "d_embed": tables[0].shape[1],
        "n_head": n_head,
        "d_head": d_head,
        "d_inner": state[layer + "pos_ff.CoreNet.0.weight"].shape[0],
        "n_layer": len(_numbered(state, "transformer.layers.{}.dec_attn.o_net.weight")),
        "div_val": tables[0].shape[1] // tables[1].shape[1] if len(tables) > 1 else 1,
        "untie_r": untie_r,
        # It starts with an empty memory.
        "mem_init": "masked",
    }
    clusters = len(state["crit.cluster_bias"]) if "crit.cluster_bias" in state else 0
    missing = [name for name in UNTOLD if name not in told]
    if len(tables) > 1:
        sizes = [len(table) for table in tables]
        config["cutoffs"] = [sum(sizes[:i]) for i in range(1, len(sizes))]
    elif clusters == 0:
        config["cutoffs"] = []
        if projections and config["d_embed"] == config["d_model"]:
            config["div_val"] = 2  # a projection without need: any value above 1 says so
    elif "cutoffs" not in told:
        missing.append("cutoffs")
    if missing:
        raise ConversionError(
            f"the parameters of an original checkpoint don't tell {', '.join(missing)}: put a config.json beside it or "
            'give them, as in config={"mem_len": 150} (--config \'{"mem_len": 150}\')'
        )
    weights = _numbered(state, "crit.out_layers.{}.weight")
    config["tie_word_embeddings"] = all(torch.equal(a, b) for a, b in zip(weights, tables, strict=True))
    config["tie_projs"] = []
    for i in range(clusters + 1):
        output, source = state.get(f"crit.out_projs.{i}"), i if len(tables) > 1 else 0
        tied = output is not None and source < len(projections) and torch.equal(output, projections[source])
        config["tie_projs"].append(tied)
    return config | told


def _numbered(state: State, pattern: str) -> list[torch.Tensor]:
    """The tensors pattern.format(0), pattern.format(1), ... as far as there are any."""
    found: list[torch.Tensor] = []
    while (name := pattern.format(len(found))) in state:
        found.append(state[name])
    return found
