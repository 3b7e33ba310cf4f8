"""Weights in autocast's precision: shared by the micro-batches of a version, and never another number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import causal_loss, cpu_devices, make_batch, tiny_gpt2
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_ouroboros.engine.core import Engine
from hf_ouroboros.engine.settings import EngineSettings
from hf_ouroboros.optim import choose
from hf_ouroboros.partition import split_model
from hf_ouroboros.reference import Reference


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=19, num_key_value_heads=1, **sizes))


def tied_gpt2() -> PreTrainedModel:
    return tiny_gpt2(dropout=0.1)


def t5() -> PreTrainedModel:
    """Asks the weights of a linear layer for their precision."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2, "dropout_rate": 0.1}
    return T5ForConditionalGeneration(T5Config(vocab_size=19, decoder_start_token_id=0, **sizes))


def trained(
    kind: type, make: Any, counts: list[int], prepare: Any = None, look: Any = None, **settings: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Engine, with what was found in it, and weights after ten micro-batches; its workers are stopped."""
    torch.set_num_threads(1)
    model = make().train()
    if prepare is not None:
        prepare(model)
    partition = split_model(model, cpu_devices(len(counts)), counts, check=False)
    given = {"seed": 3, "micro_batches": 2, "autocast_dtype": torch.bfloat16, **settings}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = kind(partition, optimizer, causal_loss, EngineSettings(**given))
    try:
        for tick in range(10):
            engine.submit(make_batch(tick, padded=True))
            if (tick + 1) % given["micro_batches"] == 0:
                engine.step()
        engine.rest()
        return engine, {name: value.clone() for name, value in model.state_dict().items()}
    finally:
        if isinstance(engine, Engine):
            engine.found = (look or shared_by)(engine)
            engine.close()


def shared_by(engine: Engine) -> list[tuple[int, int]]:
    """For each stage but the last: micro-batches in flight, and the different copies of one weight that their graphs keep."""
    found = []
    for runner in list(engine._runners.values())[:-1]:
        kept = [saved_matrices(item.output.values()) for item in runner.in_flight.values()]
        widths = {shape for each in kept for shape in each}
        found.append(
            (len(kept), max((len(set().union(*(each.get(w, set()) for each in kept))) for w in widths), default=0))
        )
    return found


def sizes_of_leaves(engine: Engine) -> list[dict[str, int]]:
    """Bytes of the weights that micro-batches of the first stage hold, by name, for each of its micro-batches in flight."""
    items = engine._runners[0].in_flight.values()
    return [{n: leaf.untyped_storage().nbytes() for n, leaf in item.leaves.items()} for item in items]


def saved_matrices(outputs: Any) -> dict[tuple[int, ...], set[int]]:
    """{shape: addresses} of the bfloat16 weights that a graph keeps."""
    found: dict[tuple[int, ...], set[int]] = {}
    for node in nodes(outputs):
        for name in ("_saved_mat2", "_saved_self"):
            saved = getattr(node, name, None) if "mm" in node.name().lower() else None
            if isinstance(saved, torch.Tensor) and saved.dtype == torch.bfloat16 and tuple(saved.shape) in WEIGHTS:
                found.setdefault(tuple(saved.shape), set()).add(saved.untyped_storage().data_ptr())
    return found


WEIGHTS = {(8, 32), (32, 8), (8, 24), (16, 24), (24, 16)}
"""Shapes of GPT-2's and Llama's feed-forward matrices, which no activation has."""


def nodes(outputs: Any) -> Iterator[Any]:
    waiting, seen = [t.grad_fn for t in outputs if t.grad_fn is not None], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


@pytest.mark.parametrize("make", [llama, tied_gpt2])
def test_micro_batches_of_a_version_share_a_copy(make: Any) -> None:
    """With three layers' worth of one shape in a stage and two versions in flight there are at most so many copies."""
    engine, _ = trained(Engine, make, [2, 2, 1], schedule="pipelined", micro_batches=2)
    (flying, copies), *_ = engine.found
    assert flying == 2
    assert all(runner._copies.proven for runner in list(engine._runners.values())[:-1])
    layers = 2  # of the first stage
    matrices = 2 if make is llama else 1  # gate and up have one shape
    assert copies == layers * matrices


@pytest.mark.parametrize("make", [llama, tied_gpt2])
def test_what_has_a_copy_has_no_older_version_besides(make: Any) -> None:
    """The leaves of the micro-batches in flight hold one number each, besides embeddings and norms."""
    engine, found = trained(Engine, make, [2, 2, 1], look=sizes_of_leaves, schedule="pipelined")
    _, expected = trained(Reference, make, [2, 2, 1], schedule="reference")
    assert all(torch.equal(expected[name], value) for name, value in found.items())
    parameters = dict(engine.partition.model.named_parameters())
    first = engine.partition.stages[0]
    copied = {f"{n}.weight" for n, m in first.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert len(engine.found) == 2
    for sizes in engine.found:
        for name, size in sizes.items():
            small = name.removesuffix("bias") + "weight" in copied or name in copied
            assert size == (4 if small else parameters[name].nbytes), name


def test_predicted_weights_and_views_of_a_script_stay_as_they_are() -> None:
    """Leaves that are no parameter's memory keep theirs; a view goes on being the parameter."""
    views: list[torch.Tensor] = []

    def prepare(model: nn.Module) -> None:
        views.append(model.model.layers[0].mlp.up_proj.weight.data)

    settings = {"compensations": choose("weight_prediction").compensations}
    engine, found = trained(Engine, llama, [2, 2, 1], prepare, schedule="pipelined", **settings)
    _, expected = trained(Reference, llama, [2, 2, 1], schedule="reference", **settings)
    assert all(torch.equal(expected[name], value) for name, value in found.items())
    assert torch.equal(views[0], found["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, tied_gpt2, t5])
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
def test_equal_to_the_reference(make: Any, schedule: str) -> None:
    counts = [2, 2, 2] if make is t5 else [2, 2, 1]
    _, expected = trained(Reference, make, counts, schedule="reference")
    _, found = trained(Engine, make, counts, schedule=schedule)
    assert all(torch.equal(expected[name], value) for name, value in found.items())


def test_a_script_s_hook_sees_the_weights_themselves() -> None:
    seen: list[torch.dtype] = []

    def prepare(model: nn.Module) -> None:
        layer = model.model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda module, given, output: seen.append(module.weight.dtype))

    engine, found = trained(Engine, llama, [2, 2, 1], prepare, schedule="pipelined")
    _, expected = trained(Reference, llama, [2, 2, 1], schedule="reference")
    assert set(seen) == {torch.float32}
    assert all(torch.equal(expected[name], value) for name, value in found.items())


def test_not_shared_where_it_is_not_what_autocast_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that computes otherwise with weights of lower precision is noticed in the first forward."""

    def looking(self: nn.Linear, given: torch.Tensor) -> torch.Tensor:
        output = nn.functional.linear(given, self.weight, self.bias)
        return output if self.weight.dtype == torch.float32 else output * 2

    monkeypatch.setattr(nn.Linear, "forward", looking)
    monkeypatch.setattr(looking, "__module__", nn.Linear.__module__)
    engine, found = trained(Engine, llama, [2, 2, 1], schedule="pipelined")
    _, expected = trained(Reference, llama, [2, 2, 1], schedule="reference")
    assert [runner._copies for runner in engine._runners.values()] == [None, None, None]
    assert all(torch.equal(expected[name], value) for name, value in found.items())
