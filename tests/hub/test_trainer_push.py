"""OuroborosTrainer pushes to the Hub under every strategy, and what it pushed loads and resumes elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loopback_hub import running_hub
from test_loopback_hub import client
from trainer_helpers import EVERY, trained

from hf_ouroboros import OuroborosTrainer

HELPERS = f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"

TRAIN = (
    HELPERS
    + """
import torch
from trainer_helpers import trained
trainer = trained(
    "out", save_strategy="steps", save_steps=2, push_to_hub=True, hub_model_id="tester/trained",
    hub_strategy=sys.argv[1], hub_always_push=True, eval_strategy="epoch",
)
assert trainer.args.push_to_hub
trainer.push_to_hub()
torch.save(trainer.model.state_dict(), "pushed.pt")
"""
)

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("tester/trained").state_dict()
expected = torch.load(sys.argv[1])
assert all(torch.equal(model[name], value) for name, value in expected.items())
assert "hf_ouroboros" not in sys.modules
"""


def card_is_ours(card: bytes) -> bool:
    _, header, text = card.decode().split("---\n", 2)
    return "- ouroboros" in header and "pipelined" in text and "1909.06695" in text


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["end", "every_save"] if EVERY else ["every_save"])
def test_pushes(tmp_path: Path, strategy: str) -> None:
    with running_hub() as hub:
        client(hub, tmp_path / "train", TRAIN, strategy)
        files = hub.files("tester/trained")
        assert {"README.md", "config.json", "model.safetensors", "training_args.bin"} <= files.keys()
        assert card_is_ours(files["README.md"])
        assert not [path for path in files if "/" in path]
        messages = [commit.message for commit in hub.repos["tester/trained"].commits]
        assert ("Training in progress, step 2" in messages) == (strategy != "end")
        local = sorted(path.name for path in (tmp_path / "train" / "out").iterdir() if path.is_dir())
        assert [name for name in local if name != ".cache"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        if strategy == "end":
            client(hub, tmp_path / "load", LOAD, str(tmp_path / "train" / "pushed.pt"))


RESUME = (
    HELPERS
    + """
import torch
from huggingface_hub import snapshot_download
from trainer_helpers import trained
options = dict(save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
trained("out", push_to_hub=True, hub_model_id="tester/half", hub_strategy="checkpoint", hub_always_push=True,
        max_steps=4, **options)
folder = snapshot_download("tester/half", allow_patterns="last-checkpoint/*")
resumed = trained("again", resume=folder + "/last-checkpoint", schedule="lockstep", **options)
whole = trained("whole", **options)
assert resumed.state.global_step == whole.state.global_step == 6
expected = whole.model.state_dict()
assert all(torch.equal(expected[name], value) for name, value in resumed.model.state_dict().items())
"""
)


@pytest.mark.slow
def test_resumes_in_the_middle_from_what_was_pushed(tmp_path: Path) -> None:
    with running_hub() as hub:
        client(hub, tmp_path / "run", RESUME)
        files = hub.files("tester/half")
        assert {path.split("/")[0] for path in files if "/" in path} == {"last-checkpoint"}
        assert {"last-checkpoint/ouroboros_state.safetensors", "last-checkpoint/ouroboros_state.json"} <= files.keys()


def test_the_arguments_in_a_checkpoint_say_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OuroborosTrainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(OuroborosTrainer, "_push_from_checkpoint", lambda self, folder: None)
    trained(tmp_path, push_to_hub=True, save_strategy="steps", save_steps=1, max_steps=1)
    args = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert args.push_to_hub
