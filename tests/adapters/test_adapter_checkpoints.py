"""Checkpoints of adapters: PEFT's files under a manifest, resumed bit for bit, refused where they are another run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import base, config, peft, stir, trained_state, wrapped
from safetensors.torch import load_file, save_file
from trainer_helpers import AtStep, differing, ouroboros, outcome, split_options, trained

from hf_ouroboros import CheckpointError
from hf_ouroboros.errors import CheckpointMismatchError

RUN: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **split_options(3, 2)}
FILES = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
KINDS = ["lora on gpt2", "dora", "vera", "modules_to_save", "lora and tokens", "ia3"]


@pytest.mark.slow
@pytest.mark.parametrize("case", KINDS)
def test_resumes_and_loads(case: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", {"model": wrapped(case)}, **RUN)
    expected = outcome(trainer)
    folder = tmp_path / "run" / "checkpoint-2"
    manifest = json.loads((folder / "ouroboros_state.json").read_text())
    names = {path.name for path in folder.iterdir()}
    assert names >= FILES and not [name for name in names if name.startswith(("model", "config"))]
    assert manifest["files"].keys() == names - {"ouroboros_state.json"}
    again = trained(tmp_path / "run", {"model": wrapped(case)}, resume=folder, **{**RUN, "schedule": "reference"})
    assert differing(expected, outcome(again)) == []
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(base(case), tmp_path / "saved").state_dict()
    assert differing(expected["weights"], dict(loaded)) == []


def two_adapters() -> Any:
    model, generator = wrapped("lora on gpt2"), torch.Generator().manual_seed(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model.add_adapter("style", config("lora on gpt2", r=2, lora_dropout=0.1))
    model.set_adapter("style")
    stir(model, generator)
    return model


@pytest.mark.slow
def test_one_of_several_adapters(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", {"model": two_adapters()}, **RUN)
    expected = outcome(trainer)
    moved = differing(two_adapters().state_dict(), expected["weights"])
    assert moved and all(".style." in name for name in moved)
    again = trained(tmp_path / "run", {"model": two_adapters()}, resume=tmp_path / "run" / "checkpoint-2", **RUN)
    assert differing(expected, outcome(again)) == []
    trainer.save_model(str(tmp_path / "saved"))
    model = peft.PeftModel.from_pretrained(base("lora on gpt2"), tmp_path / "saved")
    model.load_adapter(tmp_path / "saved" / "style", "style")
    assert differing(expected["weights"], dict(model.state_dict())) == []


@pytest.mark.slow
def test_best_adapter(tmp_path: Path) -> None:
    options = {**RUN, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trained(tmp_path, {"model": wrapped("lora on gpt2")}, **options)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    saved = load_file(best / "adapter_model.safetensors")
    for name, value in trained_state(trainer.model).items():
        assert torch.equal(value, saved[name.replace(".default", "")])
    damaged = ouroboros(tmp_path / "again", {"model": wrapped("lora on gpt2")}, **options)
    damaged.add_callback(AtStep(4, lambda: _change(tmp_path / "again" / "checkpoint-2" / "adapter_model.safetensors")))
    with pytest.raises(CheckpointError, match="adapter_model.safetensors has another content"):
        damaged.train()


def _change(path: Path) -> None:
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.slow
def test_another_run_is_refused(tmp_path: Path) -> None:
    case = "lora on gpt2"
    trained(tmp_path, {"model": wrapped(case)}, **RUN)
    folder = tmp_path / "checkpoint-2"

    def refused(model: Any, words: str, kind: type = CheckpointMismatchError) -> None:
        with pytest.raises(kind, match=words):
            trained(tmp_path, {"model": model}, resume=folder, **RUN)

    other = wrapped(case)
    next(p for n, p in other.named_parameters() if "wpe" in n).data.mul_(1.5)
    refused(other, "frozen weights are not those .*wpe")
    refused(wrapped(case, lora_alpha=3), "lora_alpha of the adapter 'default' was 8 .* is 3")
    refused(wrapped(case, r=2), "instead of")
    refused(wrapped("norms"), "has no|which this run's model has not")
    refused(base(case), "it belongs to another model")
    _change(folder / "adapter_model.safetensors")
    refused(wrapped(case), "adapter_model.safetensors has another content", CheckpointError)


@pytest.mark.slow
def test_a_changed_model_is_noticed(tmp_path: Path) -> None:
    """Another active adapter is taken up before training, and by a callback in the middle of it."""
    early = ouroboros(tmp_path / "early", {"model": two_adapters()}, **RUN)
    early.model.set_adapter("default")
    early.train()
    moved = differing(two_adapters().state_dict(), dict(early.model.state_dict()))
    assert moved and all(".default." in name for name in moved)
    losses = [early.evaluate()["eval_loss"]]
    with early.model.disable_adapter():
        losses.append(early.evaluate()["eval_loss"])
    assert losses[0] != losses[1] and early.evaluate()["eval_loss"] == losses[0]

    def changed_late(schedule: str) -> dict[str, Any]:
        late = ouroboros(tmp_path / schedule, {"model": two_adapters()}, **{**RUN, "schedule": schedule})
        late.add_callback(AtStep(1, lambda: late.model.set_adapter("default")))
        late.train()
        return outcome(late)

    expected = changed_late("reference")
    assert differing(expected, changed_late("pipelined")) == []
    assert differing(expected, outcome(trained(tmp_path / "kept", {"model": two_adapters()}, **RUN))) != []
