"""Whatever happens to a file of a checkpoint: refused by name, offering the complete one before, or the exact result.

OUROBOROS_EXHAUSTIVE=1 has every number in every JSON file replaced by every wrong value; else a few are.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import DAMAGES, WRONG_NUMBERS, kept, numbers, put, same_content
from rig import in_processes
from trainer_helpers import assert_same, ouroboros, outcome, split_options, trained
from trainer_runs import made

from hf_ouroboros import CheckpointError
from hf_ouroboros.checkpoint import STATE_META

EXHAUSTIVE = bool(os.environ.get("OUROBOROS_EXHAUSTIVE"))
SAVING = {"save_strategy": "steps", "save_steps": 2}


def write_in_processes(rank: int, folder: str) -> None:
    made(folder, {"options": SAVING | {"num_stages": 3}}).train()


class Written:
    """A run's checkpoints 2, 4 and 6, and what becomes of the run.

    Args:
        folder: of the run.
        result: weights, optimizer and scheduler at its end.
        trainer: with other weights; it tries to resume.
    """

    def __init__(self, folder: Path, result: dict[str, Any], trainer: Any):
        self.folder, self.result, self.trainer = folder, result, trainer
        self.before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        self.files = sorted(path.name for path in (folder / "checkpoint-4").iterdir())

    def resume(self, must_fail: bool = True) -> str:
        """What the refusal says; empty where the run went on, to the exact result."""
        try:
            self.trainer.train(resume_from_checkpoint=str(self.folder / "checkpoint-4"))
        except CheckpointError as error:
            # Nothing was touched.
            assert_same(self.before, dict(self.trainer.model.state_dict()))
            return str(error)
        assert_same(self.result, self.trainer)
        self.trainer.model.load_state_dict(self.before)
        return ""

    def expect(self, name: str, changed: bool = True) -> None:
        """A refusal that names the file and offers checkpoint-2; only unchanged files may pass."""
        text = self.resume()
        if text or changed:
            assert name in text, text
            assert f"The checkpoint before it is complete: resume_from_checkpoint='{self.folder}/checkpoint-2'" in text


BOTH = ["threads", "processes"]
either = pytest.mark.parametrize("written", BOTH if EXHAUSTIVE else BOTH[:1], indirect=True)
"""Reading is the same for what threads and processes have written; that both are protected is seen in every file."""


@pytest.fixture(scope="module")
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp(request.param)
    result = outcome(trained(folder / "out", **SAVING))
    if request.param == "processes":
        shutil.rmtree(folder / "out")
        in_processes(2, write_in_processes, str(folder))
    trainer = ouroboros(folder / "again")
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight += 1
    return Written(folder / "out", result, trainer)


@pytest.mark.slow
@pytest.mark.parametrize("written", BOTH, indirect=True)
def test_every_file(written: Written) -> None:
    tried = 0
    every = 3 if written.folder.parent.name.startswith("processes") and not EXHAUSTIVE else 1
    for i, name in enumerate(written.files):
        path, older = (written.folder / folder / name for folder in ("checkpoint-4", "checkpoint-2"))
        for kind, damage in [*DAMAGES.items()][i % every :: every]:
            with kept(path):
                original = path.read_bytes()
                damage(path, older)
                # Another checkpoint's manifest is itself intact; what it names is not.
                named = "trainer_state.json" if (name, kind) == (STATE_META, "swap") else name
                written.expect(named, changed=not (path.is_file() and path.read_bytes() == original))
                tried += 1
    assert tried >= len(written.files) * (len(DAMAGES) // every)
    assert written.resume() == "", "and when all is put back, it is resumed exactly"


@either
def test_numbers_in_json(written: Written) -> None:
    for name in [name for name in written.files if name.endswith(".json")]:
        path = written.folder / "checkpoint-4" / name
        places = list(numbers(json.loads(path.read_text())))
        for i, where in enumerate(places):
            if not EXHAUSTIVE and i % 8 and where[-1] not in ("global_step", "tick", "update", "num_stages"):
                continue
            for wrong in WRONG_NUMBERS if EXHAUSTIVE else WRONG_NUMBERS[i % 7 :: 7]:
                with kept(path):
                    if put(path, where, wrong):
                        written.expect(name)


@either
def test_the_one_before_is_checked_as_strictly(written: Written) -> None:
    """A flipped bit in the weights of the one before, too: then none is offered, or the one before that."""
    newest, before = written.folder / "checkpoint-4", written.folder / "checkpoint-2"
    (written.folder / "checkpoint-1").mkdir()
    name = next(name for name in written.files if name.startswith("model"))
    try:
        for damage in ("flip at 0.75", "delete", "directory"):
            with kept(newest / name), kept(before / name):
                DAMAGES["flip at 0.5"](newest / name, before / name)
                DAMAGES[damage](before / name, newest / name)
                text = written.resume()
                assert name in text and "The checkpoint before it" not in text
        with kept(newest / name), kept(before / "trainer_state.json"):
            DAMAGES["truncate"](newest / name, before / name)
            DAMAGES["swap"](before / "trainer_state.json", newest / "trainer_state.json")
            assert "The checkpoint before it" not in written.resume()
    finally:
        (written.folder / "checkpoint-1").rmdir()


# ---- while several processes resume ----


def refused(rank: int, folder: str, cases: list[tuple[str, str]]) -> list[str]:
    """What each damage, done by the main process, makes of resuming in all of them."""
    trainer, texts = made(folder, {"options": {"num_stages": 3}, "name": "again"}), []
    newest, before = (Path(folder) / "out" / f"checkpoint-{step}" for step in (4, 2))
    for name, damage in cases:
        with kept(newest / name) if rank == 0 else torch.no_grad():
            if rank == 0:
                DAMAGES[damage](newest / name, before / name)
            torch.distributed.barrier()
            with pytest.raises(CheckpointError) as caught:
                trainer.train(resume_from_checkpoint=str(newest))
            texts.append(str(caught.value))
            torch.distributed.barrier()
    return texts


@pytest.mark.slow
def test_over_processes(tmp_path: Path) -> None:
    """All say the same, and can go on."""
    in_processes(2, write_in_processes, str(tmp_path))
    files = sorted(path.name for path in (tmp_path / "out" / "checkpoint-4").iterdir())
    kinds = list(DAMAGES)
    cases = [(name, kind) for i, name in enumerate(files) for kind in (kinds if EXHAUSTIVE else [kinds[i % 5]])]
    cases = [
        (name, kind)
        for name, kind in cases
        if kind != "swap" or not same_content(*(tmp_path / "out" / f"checkpoint-{step}" / name for step in (2, 4)))
    ]
    found = in_processes(2, refused, str(tmp_path), cases, limit=1000.0)
    for (name, kind), *texts in zip(cases, *found, strict=True):
        # Beside an older manifest all other files are the ones that differ.
        older_manifest = (name, kind) == ("ouroboros_state.json", "swap")
        assert texts[0] == texts[1] and (name in texts[0] or older_manifest)
        assert f"resume_from_checkpoint='{tmp_path}/out/checkpoint-2'" in texts[0]


# ---- what a user may change ----


def reshard(folder: Path, size: str = "10KB") -> None:
    """The model saved again, in shards."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    for path in folder.glob("model*"):
        path.unlink()
    model.save_pretrained(folder, max_shard_size=size)


@pytest.fixture
def copy(tmp_path: Path, written: Written) -> Path:
    """Checkpoints that may be changed."""
    shutil.copytree(written.folder, tmp_path / "out")
    return tmp_path / "out" / "checkpoint-4"


def resume_accepting(copy: Path, **options: Any) -> Any:
    return trained(copy.parent / "on", resume=copy, resume_changed="accept", **options)


@either
def test_resharded(copy: Path, written: Written) -> None:
    reshard(copy)
    assert len(list(copy.glob("model-*.safetensors"))) > 2
    with pytest.raises(CheckpointError, match=r"model.*is missing.*resume_changed='accept'"):
        trained(copy.parent / "on", resume=copy)
    assert_same(written.result, resume_accepting(copy))


@either
def test_edited_trainer_state(copy: Path, written: Written) -> None:
    path = copy / "trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "log_history": []}))
    with pytest.raises(CheckpointError, match=r"trainer_state\.json has .*resume_changed='accept'"):
        trained(copy.parent / "on", resume=copy)
    found = resume_accepting(copy)
    assert_same(written.result, found)
    assert found.state.log_history[0]["step"] == 5


EDITS: dict[str, tuple[str, Any]] = {
    "another step": ("global_step", 2),
    "no step": ("global_step", None),
    "a negative amount": ("total_flos", -1),
    "another kind": ("log_history", {"a": 1}),
    "an unknown field": ("colour", 3),
}


@either
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_that_can_not_be_right(copy: Path, written: Written, edit: str) -> None:
    key, value = EDITS[edit]
    path = copy / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=r"trainer_state\.json.*The checkpoint before it is complete"):
        resume_accepting(copy)


@either
@pytest.mark.parametrize("kind", ["flip at 0.5", "truncate", "empty", "directory", "grow"])
def test_damage_is_not_accepted(copy: Path, written: Written, kind: str) -> None:
    """What can be told from a change: archives have checksums, headers and JSON have a form, gradients are nobody's."""
    names = [n for n in written.files if n.endswith((".pt", ".pth", ".json"))] + ["training_args.bin"]
    names += [n for n in written.files if n.startswith("ouroboros_state")]
    trainer = ouroboros(copy.parent / "on", resume_changed="accept")
    for name in sorted({*names, *(n for n in written.files if kind != "flip at 0.5")}):
        if name.endswith(".json") and kind == "flip at 0.5" and name != "ouroboros_state.json":
            continue  # may still be JSON
        if (name, kind) in (("training_args.bin", "grow"), ("training_args.bin", "directory")):
            continue  # is not read; an archive may be followed by something
        if kind == "grow" and name.endswith((".pt", ".pth")):
            continue
        with kept(copy / name):
            DAMAGES[kind](copy / name, copy / name)
            try:
                trainer.train(resume_from_checkpoint=str(copy))
            except CheckpointError as error:
                assert name in str(error) or "the model in" in str(error)
            else:  # between the parts of an archive
                assert kind == "flip at 0.5" and not name.startswith("ouroboros_state")
                assert_same(written.result, trainer)


@either
def test_a_broadcasting_shard(copy: Path, written: Written) -> None:
    """One row instead of all: a copy would spread it."""
    from safetensors.torch import load_file, save_file

    path = next(path for path in sorted(copy.glob("model*.safetensors")) if "ln_f.bias" in str(load_file(path).keys()))
    tensors = load_file(path)
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"][:1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'transformer\.ln_f\.bias' \(1,\) instead of \(16,\)"):
        resume_accepting(copy, **split_options(3, 2))
