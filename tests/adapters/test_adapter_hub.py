"""Adapters on the Hub: PEFT's files and our card are pushed, and load with plain PEFT elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_cases import wrapped
from loopback_hub import running_hub
from test_loopback_hub import client
from trainer_helpers import split_options, trained

TESTS = str(Path(__file__).parent.parent)
PATHS = f"import sys; sys.path[:0] = [{TESTS!r}, {TESTS + '/adapters'!r}, {TESTS + '/partition'!r}]\n"

TRAIN = (
    PATHS
    + """
import torch
from adapter_cases import base, wrapped
from trainer_helpers import split_options, trained
trainer = trained(
    "out", {"model": wrapped("lora on gpt2")}, save_strategy="steps", save_steps=2, push_to_hub=True, max_steps=2,
    hub_model_id="tester/adapter", hub_strategy="every_save", hub_always_push=True, **split_options(3, 2),
)
trainer.push_to_hub()
torch.save(trainer.model.state_dict(), "pushed.pt")
"""
)
LOAD = (
    PATHS
    + """
import torch
from adapter_cases import base
from peft import PeftModel
model = PeftModel.from_pretrained(base("lora on gpt2"), "tester/adapter").state_dict()
expected = torch.load(sys.argv[1])
assert expected.keys() == model.keys()
assert all(torch.equal(model[name], value) for name, value in expected.items())
"""
)


@pytest.mark.slow
def test_pushes_and_loads(tmp_path: Path) -> None:
    with running_hub() as hub:
        client(hub, tmp_path / "train", TRAIN)
        files = hub.files("tester/adapter")
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "training_args.bin"} <= files.keys()
        assert "model.safetensors" not in files
        assert "library_name: peft" in files["README.md"].decode()
        client(hub, tmp_path / "load", LOAD, str(tmp_path / "train" / "pushed.pt"))


def test_the_card_says_how_to_load_it(tmp_path: Path) -> None:
    model = wrapped("lora on gpt2")
    model.config._name_or_path = "tester/base"
    trainer = trained(tmp_path, {"model": model}, max_steps=1, **split_options(3, 2))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    count = model.get_nb_trainable_parameters()[0]
    assert "library_name: peft" in card and "base_model: tester/base" in card
    assert f"{count:,} of {model.num_parameters():,} parameters trained, starting from `tester/base`" in card
    assert "LORA adapter of a `gpt2` causal language model" in card
    assert 'base = AutoModelForCausalLM.from_pretrained("tester/base")' in card
    assert "from peft import PeftModel" in card and "model = PeftModel.from_pretrained(base, " in card
    assert f"trained: {count:,}; the others are frozen" in str(trainer.stage_plan)
