"""Under autocast, the weights below adapters have one copy in bfloat16 for ever, and the numbers stay what they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import base, peft, stir, wrapped
from test_compute_copies import llama, tied_gpt2
from test_compute_copies import trained as run_of
from torch import nn
from trainer_helpers import differing, logged, outcome, split_options, trained
from transformers import TrainerCallback

from hf_ouroboros.adapters import base_of
from hf_ouroboros.engine import compute_copies
from hf_ouroboros.engine.core import Engine
from hf_ouroboros.partition.multiplied import multiplied
from hf_ouroboros.reference import Reference

CALLED = ["lora on gpt2", "lora on llama", "rslora", "ia3", "vera", "oft", "loha", "lokr", "fourier"]
RUN: dict[str, Any] = {"max_steps": 5, "gradient_accumulation_steps": 1, "bf16": True, **split_options(3, 2)}


def below(model: nn.Module) -> set[str]:
    """Places of the weights below adapters that may be exchanged for copies."""
    return {name for name in multiplied(base_of(model)) if "base_layer" in name}


@pytest.mark.parametrize("case", CALLED)
def test_what_is_only_called_may_be_a_copy(case: str) -> None:
    model = base_of(wrapped(case))
    found = multiplied(model)
    linear = {f"{n}.weight" for n, m in model.named_modules() if n.endswith("base_layer")}
    assert linear and linear <= found
    assert not any("lora_" in name or "vera_" in name or "oft_" in name for name in found)


@pytest.mark.parametrize("case", ["dora", "hra", "miss", "parameters", "experts"])
def test_what_is_computed_with_may_not(case: str) -> None:
    model = wrapped(case)
    called = {
        n
        for n, m in base_of(model).named_modules()
        if type(m).__name__ == "Linear" and "lora.layer" in type(m).__module__
    }
    names = below(model)
    assert case == "experts" or not names
    assert all(name.rpartition(".base_layer")[0] in called for name in names)


def test_a_merged_adapter_may_be_taken_out_again() -> None:
    model = wrapped("lora on llama")
    before = below(model)
    model.merge_adapter()
    assert before and not below(model)
    model.unmerge_adapter()
    assert below(model) == before


def adapted(make: Any) -> Any:
    """A model of another test with LoRA on all of its layers' matrices."""
    model = make()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    stir(model, torch.Generator().manual_seed(1))
    return base_of(model)


@pytest.mark.parametrize("make", [llama, tied_gpt2])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_one_copy_for_all_versions(make: Any, micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many micro-batches, and versions of the adapters, are in flight, and for as long as the run goes on."""
    made: list[str] = []
    real = compute_copies._hastened
    monkeypatch.setattr(compute_copies, "_hastened", lambda copy: made.append("made") or real(copy))
    engine, _ = run_of(Engine, partial(adapted, make), [2, 2, 1], schedule="pipelined", micro_batches=micro_batches)
    layers, matrices = 2, 2 if make is llama else 1  # of a stage, and of the shape that is looked for
    assert engine.found == [(2, layers * matrices), (1, layers * matrices)]
    copies = [runner._copies for runner in list(engine._runners.values())[:-1]]
    assert all(each.proven for each in copies) and len(made) == sum(len(each._sources) for each in copies)


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", CALLED)
@pytest.mark.parametrize(
    ("schedule", "stages"), [("pipelined", 3), ("pipelined", 2), ("lockstep", 3), ("zero_bubble", 3)]
)
def test_equal_to_the_reference(case: str, schedule: str, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And to what autocast computes without copies."""
    dropout = {"lora_dropout": 0.1} if case.startswith("lora") else {}
    counts = [base(case).config.num_hidden_layers - stages + 1, *[1] * (stages - 1)]

    def run(kind: type, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        return run_of(kind, lambda: base_of(wrapped(case, **dropout)), counts, look=lambda engine: None, **options)

    engine, found = run(Engine, schedule=schedule)
    assert all(runner._copies.proven for runner in list(engine._runners.values())[:-1])
    monkeypatch.setattr(compute_copies, "multiplied", lambda stage: set())
    assert differing(run(Engine, schedule=schedule)[1], found) == []
    if schedule != "zero_bubble":  # without delays
        assert differing(run(Reference, schedule="reference")[1], found) == []


def layer_of(model: Any) -> Any:
    """A layer with an adapter in the first stage."""
    return next(module for module in model.modules() if hasattr(module, "base_layer"))


@torch.no_grad()
def write(model: Any) -> None:
    layer_of(model).base_layer.weight.mul_(0.5)


def merge(model: Any) -> None:
    layer_of(model).merge()


def unmerge(model: Any) -> None:
    layer_of(model).unmerge()


def disable(model: Any) -> None:
    layer_of(model).enable_adapters(False)


def merge_and_disable(model: Any) -> None:
    merge(model)
    disable(model)


def thaw(model: Any) -> None:
    layer_of(model).base_layer.weight.requires_grad_(True)


def freeze(model: Any) -> None:
    layer_of(model).base_layer.weight.requires_grad_(False)


class Changes(TrainerCallback):
    """Changes the model at the end of some steps."""

    def __init__(self, changes: dict[int, Any]):
        self.changes = changes

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.changes.get(state.global_step, lambda model: None)(model)


CHANGES: dict[str, dict[int, Any]] = {
    "a frozen weight is written": {2: write, 3: write},
    "an adapter is merged for a while": {2: merge, 4: unmerge},
    "a merged adapter is taken out by a forward": {2: merge_and_disable},
    "an adapter is disabled": {2: disable},
    "a weight is trained for a while": {2: thaw, 4: freeze},
    "a trained weight is frozen": {0: thaw, 3: freeze},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("kind", ["lora on gpt2", "lora on llama"])
def test_what_callbacks_change_counts(kind: str, case: str, tmp_path: Path) -> None:
    found = []
    for schedule in ("reference", "pipelined"):
        model = wrapped(kind)
        if 0 in CHANGES[case]:
            CHANGES[case][0](model)
        options = {**RUN, "max_steps": 7, "eval_strategy": "steps", "eval_steps": 1, "schedule": schedule}
        given = {"model": model, "callbacks": [Changes(CHANGES[case])]}
        found.append(trained(tmp_path / schedule, given, **options))
    assert differing(*map(outcome, found)) == []
    assert logged(found[0], "loss") == logged(found[1], "loss")


@pytest.mark.slow
def test_resumes(tmp_path: Path) -> None:
    case, options = "lora on gpt2", {**RUN, "save_strategy": "steps", "save_steps": 2}
    expected = trained(tmp_path / "run", {"model": wrapped(case)}, **options)
    again = trained(tmp_path / "run", {"model": wrapped(case)}, resume=tmp_path / "run" / "checkpoint-2", **options)
    assert differing(outcome(expected), outcome(again)) == []
