"""`torch_compile=True`: layers run compiled, under every schedule to the reference's numbers, whatever came first; or it is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_helpers import tiny_xl
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import Dataset
from trainer_helpers import EVERY, Rows, differing, logged, ouroboros, outcome, split_options, tiny_model, trained
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_ouroboros import OuroborosError
from hf_ouroboros.errors import UnsupportedModelError
from hf_ouroboros.partition import split_model
from hf_ouroboros.partition.compiled import Compilation

# "eager" runs the captured graphs as they are, "aot_eager" its operations and those of its derivative; no compiler is needed.
CAPTURED = {"torch_compile_backend": "eager"}
RUN: dict[str, Any] = {"max_steps": 3, "gradient_accumulation_steps": 1, "device_map": [1, 1], **split_options(2, 2)}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, num_key_value_heads=1, **sizes))


def gpt2() -> PreTrainedModel:
    """With dropout of every kind."""
    return tiny_model(tied=False, layers=2)


class Lengths(Dataset):
    """Texts of different lengths, one length per row of a batch of one."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(self.lengths[index]) * (index + 2) % 61
        return {"input_ids": ids, "labels": ids}


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, gpt2] if EVERY else [gpt2])
def test_schedules_agree(make: Any, tmp_path: Path) -> None:
    """No operation is left out of the graphs, not even dropout, and none is computed otherwise by a backend that fuses nothing."""
    found = trained(tmp_path / "pipelined", {"model": make()}, **RUN, torch_compile_backend="aot_eager")
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] >= 2
    plain = trained(tmp_path / "plain", {"model": make()}, schedule="reference", **RUN)
    assert differing(outcome(plain), outcome(found)) == []
    assert found.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["autocast", "dtype"] if EVERY else ["autocast"])
def test_schedules_agree_in_bfloat16(precision: str, tmp_path: Path) -> None:
    """Copies of weights in autocast's precision, and weights that are of it, are compiled to one set of numbers."""
    run = {**RUN, "bf16": precision == "autocast"}
    runs = []
    for schedule, backend in (("reference", "aot_eager"), ("pipelined", "aot_eager"), ("pipelined", None)):
        model = llama() if precision == "autocast" else llama().to(torch.bfloat16)
        given = {"model": model, "train_dataset": Rows(18, masks=False)}
        more = {"schedule": schedule, **({} if backend is None else {"torch_compile_backend": backend})}
        runs.append(trained(tmp_path / f"{schedule} {backend}", given, **run, **more))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] >= 2
    assert differing(outcome(runs[0]), outcome(runs[1])) == []
    assert logged(runs[1], "loss") == logged(runs[0], "loss")
    assert differing(outcome(runs[2]), outcome(runs[1])) == []


@pytest.mark.slow
@pytest.mark.skipif(not EVERY, reason="compiles for a while: HF_OUROBOROS_EVERY_CASE=1 runs it")
def test_replays_of_compiled_layers(tmp_path: Path) -> None:
    compiled = {**RUN, "weights": "now", **CAPTURED}
    expected = trained(tmp_path / "reference", {"model": gpt2()}, schedule="reference", **compiled)
    found = trained(tmp_path / "pipelined", {"model": gpt2()}, **compiled)
    assert differing(outcome(expected), outcome(found)) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.skipif(not EVERY, reason="compiles for a minute: HF_OUROBOROS_EVERY_CASE=1 runs it")
def test_inductor(tmp_path: Path) -> None:
    """The backend that people use fuses operations, and which kernels it makes of a graph may depend on what it has in its cache."""
    run = {**RUN, "max_steps": 2, "torch_compile": True}
    found = trained(tmp_path / "pipelined", {"model": gpt2()}, **run)
    assert not counters["graph_break"]
    plain = trained(tmp_path / "plain", {"model": gpt2()}, **{**RUN, "max_steps": 2})
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_lengths_are_compiled_once_and_resuming_changes_nothing(tmp_path: Path) -> None:
    """A resumed run meets another length first."""
    data = {"train_dataset": Lengths([9, 12, 5, 7, 15, 11]), "eval_dataset": None}
    run = {**RUN, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "max_steps": 6, **CAPTURED}
    run |= {"save_steps": 3, "save_strategy": "steps"}
    whole = trained(tmp_path / "whole", {"model": llama(), **data}, **run)
    assert counters["stats"]["unique_graphs"] == 2  # one per layer
    resumed = trained(tmp_path / "whole", {"model": llama(), **data}, resume=tmp_path / "whole/checkpoint-3", **run)
    assert differing(outcome(whole), outcome(resumed)) == []


@pytest.mark.slow
def test_what_a_launch_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch --dynamo_backend` sets it; a later run of the same trainer need not be compiled."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    made = ouroboros(tmp_path, {"model": llama()}, **RUN)
    made.train()
    assert counters["stats"]["unique_graphs"] == 4  # with a mask and without
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    counters.clear()
    made.train()
    assert not counters["stats"]


def hooked(trainer: Any) -> None:
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda module, given, output: output * 2)


def noisy(trainer: Any) -> None:
    trainer.model.model.layers[0].mlp.act_fn = Noise()


class Noise(nn.Module):
    """Draws what is not dropout."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Adds noise."""
        return hidden + torch.rand_like(hidden) if self.training else hidden


Noise.__module__ = Noise.forward.__module__ = "transformers.noise"  # not of a script


@pytest.mark.parametrize(("prepare", "why"), [(hooked, "code of the script"), (noisy, "random numbers other than")])
@pytest.mark.parametrize("schedule", ["pipelined", "reference"])
def test_refused_before_the_first_update(prepare: Any, why: str, schedule: str, tmp_path: Path) -> None:
    made = ouroboros(tmp_path, {"model": llama()}, schedule=schedule, **RUN, **CAPTURED)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    prepare(made)
    with pytest.raises(OuroborosError, match=f"torch_compile=True compiles the layers of stage 0, but there is {why}"):
        made.train()
    assert all(torch.equal(before[name], value) for name, value in made.model.state_dict().items())


def test_a_family_of_its_own_is_refused() -> None:
    partition = split_model(tiny_xl(), ["cpu:0", "cpu:1"], check=False)
    with pytest.raises(
        UnsupportedModelError, match="torch_compile compiles the layers of stages that run the model's own"
    ):
        partition.compile_layers(Compilation("eager"))
