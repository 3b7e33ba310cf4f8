"""Measuring on devices that are here: every unit gets times, layers alike are measured once, results are remembered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_gpt2
from transformers import Gemma3nTextConfig, Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from hf_ouroboros.errors import UnsupportedModelError
from hf_ouroboros.models.transfo_xl import TransfoXLConfig
from hf_ouroboros.planning import kept_times, measure
from hf_ouroboros.planning.measure import measured
from hf_ouroboros.planning.unit_facts import model_facts


@pytest.fixture(autouse=True)
def nothing_measured_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_so_far", {})


def refuse(*arguments: object) -> None:
    raise AssertionError("measured again")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_every_unit_gets_times(tied: bool) -> None:
    config = tiny_gpt2(tied).config
    facts = model_facts(config, 2, 8)
    threads = torch.get_num_threads()
    devices = measured(config, facts, ["cpu:0", "cpu:1"], cache=None)
    assert torch.get_num_threads() == threads
    assert [device.name for device in devices] == ["cpu:0", "cpu:1"]
    for device in devices:
        assert device.memory == float("inf")
        embedding, *layers, norm, head = device.times
        assert len(layers) == facts.layers and len(set(layers)) == 1
        assert min(layers[0].forward, layers[0].backward, layers[0].step, embedding.forward, head.backward) > 0
        assert (norm.forward, norm.backward, norm.step) == (0, 0, 0)  # measured with the head
        assert (head.step == 0) is tied  # the embedding steps a tied matrix


def test_transformer_xl_without_memory() -> None:
    sizes = {"d_model": 32, "d_embed": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "n_layer": 3, "vocab_size": 64}
    config = TransfoXLConfig(**sizes, cutoffs=[], div_val=1, tie_projs=[False], mem_len=0)
    (device,) = measured(config, model_facts(config, 2, 8), ["cpu:0"], cache=None)
    assert min(device.times[1].forward, device.times[1].backward, device.times[-1].forward) > 0


def test_results_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_gpt2().config
    facts = model_facts(config, 2, 8)
    first = measured(config, facts, ["cpu:0"], cache=tmp_path)
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())[0]) == len(facts.units)
    monkeypatch.setattr(measure, "_measure", refuse)
    assert measured(config, facts, ["cpu:0"], cache=None) == first  # in memory
    measure._so_far.clear()
    assert measured(config, facts, ["cpu:0"], cache=tmp_path) == first  # in the file
    for others in (model_facts(config, 1, 8), model_facts(config, 2, 8, torch.bfloat16)):
        with pytest.raises(UnsupportedModelError, match="measured again"):
            measured(config, others, ["cpu:0"], cache=tmp_path)
    with pytest.raises(UnsupportedModelError, match="measured again"):
        measured(config, facts, ["cpu:0", "cpu:1"], cache=tmp_path)
    with pytest.raises(UnsupportedModelError, match="measured again"):
        measured(config, facts, ["cpu:0"], cache=tmp_path, again=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[[[1.0, 2.0",
        b"null",
        b"[]",
        b"[[]]",
        b'[[["1", null, 3]]]',
        b"\xff",
        b"[" * 100_000,
        b"[[[NaN,0,0]]]",
        None,
    ],
)
def test_a_file_that_holds_no_measurements_is_replaced(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_gpt2().config
    facts = model_facts(config, 2, 8)
    times = [[[1.0, 2.0, 3.0]] * len(facts.units)]
    monkeypatch.setattr(measure, "_measure", lambda *arguments: times)
    told: list[str] = []
    monkeypatch.setattr(kept_times.logger, "warning", told.append)
    file = tmp_path / f"{measure._key(config, facts, ['cpu:0'])}.json"
    if content is None:
        file.mkdir()  # can't be replaced, which is no reason to fail
    else:
        file.write_bytes(content)
    (device,) = measured(config, facts, ["cpu:0"], cache=tmp_path)
    assert device.times[0].backward == 2.0
    assert "holds no measurements" in told[0] or "can't be read" in told[0]
    if content is None:
        assert "are not kept for the next time" in told[1]
    else:
        assert json.loads(file.read_text()) == times and list(tmp_path.iterdir()) == [file]


def test_a_failure_ends_all_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_gpt2().config
    facts = model_facts(config, 2, 8)

    def fail(self: object, *arguments: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(measure._DeviceRun, "_step", fail)
    with pytest.raises(UnsupportedModelError, match="can't be measured .*MemoryError: no room"):
        measured(config, facts, ["cpu:0", "cpu:1"], cache=None)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "built"),
    [
        (LlamaConfig(**SMALL, num_hidden_layers=4), 1),
        (
            Qwen3MoeConfig(
                **SMALL,
                num_hidden_layers=4,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                mlp_only_layers=[0],
            ),
            2,
        ),
        (Gemma3TextConfig(**SMALL, num_hidden_layers=8, head_dim=8, sliding_window=4), 6),
    ],
    ids=["llama", "a dense layer, then experts", "one layer of six sees all"],
)
def test_of_every_kind_of_layer_one_is_built(
    config: PretrainedConfig, built: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = []
    run = measure._DeviceRun.run
    monkeypatch.setattr(
        measure._DeviceRun,
        "run",
        lambda self: layers.append(self.model.config.num_hidden_layers) or run(self),
    )
    facts = model_facts(config, 1, 8)
    (device,) = measured(config, facts, ["cpu:0"], cache=None)
    assert layers == [built]
    assert len(device.times) == len(facts.units)
    assert all(min(t.forward, t.backward, t.step) > 0 for t in device.times[1:-2])


@pytest.mark.slow
def test_what_else_crosses_boundaries_is_handed_on() -> None:
    """Layers of a Gemma 3n get embeddings of their own, and keys and values of earlier layers."""
    config = Gemma3nTextConfig(
        **SMALL | {"intermediate_size": [48] * 4},
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    (device,) = measured(config, model_facts(config, 1, 8), ["cpu:0"], cache=None)
    assert all(t.forward > 0 and t.backward > 0 for t in device.times[:5])


def test_what_can_only_be_planned_is_refused() -> None:
    config = LlamaConfig(**SMALL, num_hidden_layers=2)
    facts = replace(model_facts(config, 1, 8), untrainable="this model can't be split into stages")
    with pytest.raises(UnsupportedModelError, match="so it can't be measured; plan for device kinds instead"):
        measured(config, facts, ["cpu:0"], cache=None)


def test_what_the_machine_has_no_memory_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_gpt2().config
    monkeypatch.setattr(measure, "_measure", refuse)
    with pytest.raises(UnsupportedModelError, match=r"needs about [0-9,]+ GiB, but this machine has"):
        measured(config, model_facts(config, 2**20, 64), ["cpu:0"], cache=None)


def test_rows_that_are_longer_than_the_model_takes() -> None:
    config = tiny_gpt2().config
    with pytest.raises(UnsupportedModelError, match="can't be measured with micro-batches of 1 x 5000 tokens on cpu:0"):
        measured(config, model_facts(config, 1, 5000), ["cpu:0"], cache=None)
