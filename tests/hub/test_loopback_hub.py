"""The loopback hub is enough: plain transformers pushes to it and loads from it, each in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import Hub, running_hub
from trainer_helpers import EVERY

TINY = """
import torch, transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
torch.manual_seed(0)
torch.set_num_threads(1)
config = transformers.GPT2Config(
    vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
model = transformers.GPT2LMHeadModel(config)
words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
words.pre_tokenizer = Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
"""

PUSH = """
model.push_to_hub("tiny")
tokenizer.push_to_hub("tester/tiny", commit_message="with tokenizer")
torch.save(model.state_dict(), "pushed.pt")
"""

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
repo_id, revision, pushed = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repo_id, revision=revision)
expected = torch.load(pushed)
found = model.state_dict()
assert found.keys() == expected.keys()
assert all(torch.equal(found[name], expected[name]) for name in expected)
assert AutoTokenizer.from_pretrained(repo_id, revision=revision)("w3 w5").input_ids == [3, 5]
"""

TRAIN = """
import sys
args = transformers.TrainingArguments(
    output_dir="out", max_steps=2, save_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[],
    push_to_hub=True, hub_model_id="tester/trained", hub_strategy=sys.argv[1], hub_always_push=True,
    disable_tqdm=True,
)
data = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(8)]
trainer = transformers.Trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()
torch.save(trainer.model.state_dict(), "pushed.pt")
"""

HUB_CALLS = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub import errors

def raised(kind, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind:
        return True
    return False

api = HfApi()
assert api.whoami()["name"] == "tester"
url = api.create_repo("calls")
assert url.repo_id == "tester/calls"
assert api.create_repo("tester/calls", exist_ok=True).repo_id == "tester/calls"
assert raised(errors.HfHubHTTPError, api.create_repo, "calls")
assert not api.repo_exists("tester/none")
Path("folder/sub").mkdir(parents=True)
Path("folder/a.txt").write_text("a")
Path("folder/sub/b.bin").write_bytes(bytes(range(256)) * 100)
Path("folder/empty").write_bytes(b"")
Path("folder/README.md").write_text("---\\ntags: [x]\\n---\\n# calls")
first = api.upload_folder(repo_id="tester/calls", folder_path="folder", commit_message="one").oid
assert api.upload_folder(repo_id="tester/calls", folder_path="folder").oid == first  # nothing changed
Path("folder/a.txt").write_text("a2")
without = dict(delete_patterns="sub/*", ignore_patterns="sub/*")
api.upload_folder(repo_id="tester/calls", folder_path="folder", **without)
now = ["README.md", "a.txt", "empty"]
assert sorted(api.list_repo_files("tester/calls")) == now
assert sorted(api.list_repo_files("tester/calls", revision=first)) == [*now, "sub/b.bin"]
assert Path(hf_hub_download("tester/calls", "a.txt")).read_text() == "a2"
assert Path(hf_hub_download("tester/calls", "a.txt", revision=first)).read_text() == "a"
api.create_branch("tester/calls", branch="feature/x", revision=first)
api.upload_file(path_or_fileobj=b"c", path_in_repo="c.txt", repo_id="tester/calls", revision="feature/x")
folder = Path(snapshot_download("tester/calls", revision="feature/x"))
assert (folder / "sub/b.bin").read_bytes() == bytes(range(256)) * 100
assert (folder / "c.txt").read_bytes() == b"c" and (folder / "empty").read_bytes() == b""
assert not api.file_exists("tester/calls", "c.txt")
assert raised(errors.EntryNotFoundError, hf_hub_download, "tester/calls", "none.txt")
assert raised(errors.RevisionNotFoundError, hf_hub_download, "tester/calls", "a.txt", revision="none")
assert raised(errors.RepositoryNotFoundError, hf_hub_download, "tester/none", "a.txt")
assert raised(errors.HfHubHTTPError, HfApi(token=False).create_repo, "tester/other")
"""


def client(hub: Hub, folder: Path, code: str, *args: str) -> None:
    """Run code as a client of the hub, in a folder and with a Hub cache of its own."""
    folder.mkdir()
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(
        command, cwd=folder, env=hub.env(folder / "home"), capture_output=True, text=True, timeout=140
    )
    assert done.returncode == 0, f"{done.stderr}\n{chr(10).join(hub.requests[-20:])}"


@pytest.mark.parametrize("lfs_from", [None, 1000], ids=["regular", "lfs"])
def test_hub_calls(tmp_path: Path, lfs_from: int | None) -> None:
    with running_hub(lfs_from=lfs_from) as hub:
        client(hub, tmp_path / "a", HUB_CALLS)
        assert hub.files("tester/calls", "feature/x")["a.txt"] == b"a"
        assert len(hub.large) == (0 if lfs_from is None else 1)
        with pytest.raises(KeyError, match="no revision 'gone'"):
            hub.files("tester/calls", "gone")


@pytest.mark.slow
def test_push_and_load_a_model(tmp_path: Path) -> None:
    with running_hub(lfs_from=10_000) as hub:  # the weights travel by LFS, the configuration does not
        client(hub, tmp_path / "push", TINY + PUSH)
        files = hub.files("tester/tiny")
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
        assert json.loads(files["config.json"])["n_embd"] == 32
        client(hub, tmp_path / "load", LOAD, "tester/tiny", "main", str(tmp_path / "push/pushed.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["end", "all_checkpoints"] if EVERY else ["all_checkpoints"])
def test_trainer_pushes(tmp_path: Path, strategy: str) -> None:
    with running_hub() as hub:
        client(hub, tmp_path / "train", TINY + TRAIN, strategy)
        files, history = hub.files("tester/trained"), hub.repos["tester/trained"].commits
        assert {"README.md", "model.safetensors", "training_args.bin"} <= set(files)
        checkpoints = {path.split("/")[0] for path in files if "/" in path}
        assert checkpoints == ({"checkpoint-1", "checkpoint-2"} if strategy == "all_checkpoints" else set())
        assert history[0].files == {} and "End of training" in [commit.message for commit in history]
        client(hub, tmp_path / "load", LOAD, "tester/trained", history[-1].sha, str(tmp_path / "train/pushed.pt"))


def test_two_hubs_do_not_know_each_other() -> None:
    with running_hub() as one, running_hub() as two:
        assert one.url != two.url
        assert one.repos is not two.repos
        assert one.env("x")["HF_ENDPOINT"] == one.url
        assert "HF_HUB_OFFLINE" not in one.env("x")
