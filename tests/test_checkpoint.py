"""Checkpoints on disk: damage is refused before anything is touched, and a killed save leaves whole ones only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import (
    assert_same,
    ouroboros,
    outcome,
    run_python,
    split_options,
    stock,
    tiny_model,
    trained,
)

from hf_ouroboros import CheckpointError
from hf_ouroboros.checkpoint import (
    STATE_META,
    STATE_TENSORS,
    load_run_state,
    save_run_state,
    save_state_part,
    write_manifest,
)
from hf_ouroboros.checkpoint.placing import appearing_whole
from hf_ouroboros.engine.state import RunState


def run_state() -> RunState:
    generator = torch.Generator().manual_seed(0)

    def gradient(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    pending = {
        0: {3: {"a.weight": gradient(2, 3)}, 4: {"a.weight": gradient(2, 3), "b": gradient(1)}},
        1: {4: {}},
        2: {},
    }
    return RunState(3, "joint", 7, 5, 2, 0, pending)


# ---- the two files ----


@pytest.mark.parametrize("kind", [str, Path])
def test_round_trip(tmp_path: Path, kind: type) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    save_run_state(kind(tmp_path), run_state())
    found = load_run_state(kind(tmp_path))
    expected = run_state()
    assert found.meta() == expected.meta()
    assert_same(found.pending, expected.pending)


def test_state_without_pending_gradients(tmp_path: Path) -> None:
    save_run_state(tmp_path, RunState(1, "joint", 0, 4, 2, None, {0: {}}))
    assert load_run_state(tmp_path).pending == {0: {}}


def test_non_contiguous_and_half_precision_gradients(tmp_path: Path) -> None:
    gradient = torch.arange(6.0).view(2, 3).t().to(torch.bfloat16)
    save_run_state(tmp_path, RunState(2, "joint", 0, 1, 1, 0, {0: {0: {"w": gradient}}, 1: {}}))
    found = load_run_state(tmp_path).pending[0][0]["w"]
    assert found.dtype == torch.bfloat16 and torch.equal(found, gradient)


def remembering(streams: dict[int, tuple[int, int]], value: float) -> RunState:
    memories = {group: {"layer": torch.full((width, 2), value)} for group, (width, _) in streams.items()}
    return RunState(1, "joint", 0, 4, 2, None, {0: {}}, streams, {0: memories})


def test_memories_of_replicas(tmp_path: Path) -> None:
    """Each replica gets its own; for another R, of columns that several hold, what was read last."""
    first = remembering({0: (2, 9), 2: (1, 5), 3: (1, 5)}, 1.0)  # 2 and 3 went to the other replica after segment 5
    second = remembering({2: (2, 9), 0: (1, 5), 1: (1, 5)}, 2.0)
    parts = [save_state_part(tmp_path, state, replica, 0) for replica, state in enumerate((first, second))]
    write_manifest(tmp_path, parts, replicas=2)
    for replica, expected in enumerate((first, second)):
        found = load_run_state(tmp_path, replica=replica, replicas=2)
        assert found.streams == expected.streams
        assert_same(found.memories, expected.memories)
    merged = load_run_state(tmp_path, replicas=1)
    assert merged.streams == {0: (2, 9), 2: (2, 9)}
    assert_same(merged.memories, {0: {0: first.memories[0][0], 2: second.memories[0][2]}})


META_GARBAGE = ["", "{", "null", "[]", "3", "{}", '{"format": 4}', "\x00\x01", '{"format": 4, "files": {"x": 3}}']


@pytest.mark.parametrize("text", META_GARBAGE)
def test_garbage_instead_of_the_meta_file(tmp_path: Path, text: str) -> None:
    save_run_state(tmp_path, run_state())
    (tmp_path / STATE_META).write_text(text)
    with pytest.raises(CheckpointError):
        load_run_state(tmp_path)


def test_meta_file_that_is_not_text(tmp_path: Path) -> None:
    save_run_state(tmp_path, run_state())
    (tmp_path / STATE_META).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="damaged"):
        load_run_state(tmp_path)


WRONG_META: dict[str, Any] = {
    "format": 99,
    "parts": [{"file": STATE_TENSORS, "replica": 1, "streams": {}}],
    "replicas": None,
    "pending_ticks": {"0": [3, 4], "1": [4]},
    "num_stages": None,
}


@pytest.mark.parametrize("key", WRONG_META)
@pytest.mark.parametrize("missing", [True, False])
def test_meta_file_with_wrong_entries(tmp_path: Path, key: str, missing: bool) -> None:
    save_run_state(tmp_path, run_state())
    meta = json.loads((tmp_path / STATE_META).read_text())
    meta[key] = WRONG_META[key]
    if missing:
        del meta[key]
    elif key in ("num_stages", "pending_ticks"):
        pytest.skip("is found when the state meets the model")
    (tmp_path / STATE_META).write_text(json.dumps(meta))
    with pytest.raises(CheckpointError):
        load_run_state(tmp_path)


def test_meta_file_whose_manifest_is_a_list(tmp_path: Path) -> None:
    save_run_state(tmp_path, run_state())
    meta = json.loads((tmp_path / STATE_META).read_text())
    (tmp_path / STATE_META).write_text(json.dumps(meta | {"files": []}))
    with pytest.raises(CheckpointError):
        load_run_state(tmp_path)


def test_every_flipped_bit_of_the_state_is_found(tmp_path: Path) -> None:
    save_run_state(tmp_path, run_state())
    path = tmp_path / STATE_TENSORS
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            load_run_state(tmp_path)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist|doesn't exist|no such|not found"):
        load_run_state(tmp_path / "nowhere")


# ---- directories that appear whole ----


def test_appearing_whole(tmp_path: Path) -> None:
    with appearing_whole(tmp_path / "run") as staging:
        (staging / "checkpoint-1" / "sub").mkdir(parents=True)
        (staging / "checkpoint-1" / "sub" / "a").write_text("a")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [staging.name]
        assert staging.name.startswith(".")
    assert (tmp_path / "run" / "checkpoint-1" / "sub" / "a").read_text() == "a"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


def test_appearing_whole_replaces(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "old").write_text("old")
    with appearing_whole(tmp_path) as staging:
        (staging / "checkpoint-1").mkdir()
        (staging / "checkpoint-1" / "new").write_text("new")
    assert [path.name for path in (tmp_path / "checkpoint-1").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_appearing_whole_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(KeyError), appearing_whole(tmp_path) as staging:
        (staging / "checkpoint-2").mkdir()
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_leftovers_are_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / ".saving-1" / "checkpoint-1"
    left.mkdir(parents=True)
    (left / "part").write_text("part")
    with appearing_whole(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


# ---- damage that a trainer meets ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trained(folder, save_strategy="steps", save_steps=2, max_steps=2)
    return folder / "checkpoint-2"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "config.json",
    STATE_TENSORS,
    STATE_META,
]


def assert_refused(trainer: Any, folder: Path, match: str | None = None) -> None:
    """The run is refused by name, and neither weights nor optimizer were touched."""
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        trainer.train(resume_from_checkpoint=str(folder))
    assert_same(before, dict(trainer.model.state_dict()))


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer whose weights are not those of the checkpoint."""
    trainer = ouroboros(tmp_path_factory.mktemp("other"))
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight += 1
    return trainer


@pytest.mark.parametrize("damage", [cut, grow, empty, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files(
    tmp_path: Path, checkpoint: Path, other_weights: Any, name: str, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-2"))
    damage(folder / name)
    if (name, damage) == (STATE_META, grow):
        (folder / name).write_text((folder / name).read_text(errors="replace") + "}")
    assert_refused(other_weights, folder, match=name.replace(".", r"\."))


def test_stock_checkpoint(tmp_path: Path, other_weights: Any) -> None:
    stock(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    assert_refused(other_weights, tmp_path / "checkpoint-1", match=r"ouroboros_state\.json.*OuroborosTrainer")


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "more stages": (split_options(4, 3), r"written with 3 stages, this run has 4.*num_stages=3"),
    "one stage": (split_options(1, 1), "written with 3 stages, this run has 1"),
    "other layers": ({"device_map": [2, 2, 1]}, "same device_map"),
    "synchronous": ({"schedule": "1f1b"}, "delayed gradients that are still to be applied"),
    "longer warm-up": ({"delay_warmup_steps": 5}, "delay_warmup_steps"),
    "paper": ({"schedule": "lockstep", "tied_gradient": "paper"}, "tied_gradient='joint'"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_state_of_another_run_leaves_the_weights_alone(tmp_path: Path, checkpoint: Path, case: str) -> None:
    options, match = MISFITS[case]
    assert_refused(ouroboros(tmp_path, **options), checkpoint, match)


def test_a_state_of_another_model_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    trainer = ouroboros(tmp_path, {"model": tiny_model(tied=False)}, num_stages=3)
    with pytest.raises((CheckpointError, ValueError)):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_after_a_refusal_the_trainer_still_trains(tmp_path: Path, checkpoint: Path) -> None:
    trainer = ouroboros(tmp_path)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-2"))
    cut(folder / STATE_TENSORS)
    assert_refused(trainer, folder)
    trainer.train()
    assert_same(trained(tmp_path / "b"), trainer)


# ---- killed while saving ----

KILLED = """
import os, signal, sys
from pathlib import Path
from trainer_helpers import trained
import hf_ouroboros.hooks.checkpoints, torch

folder, where, nth = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0

def deadly(function, before):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == nth and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

module, name, before = {
    "torch.save": (torch, "save", True),
    "torch.save done": (torch, "save", False),
    "manifest": (hf_ouroboros.hooks.checkpoints, "write_manifest", True),
    "rename": (os, "rename", True),
}[where]
setattr(module, name, deadly(getattr(module, name), before))
trained(folder, save_strategy="steps", save_steps=1)
"""


def whole(folder: Path) -> list[str]:
    """Checkpoints that can be resumed from."""
    found = sorted(path for path in folder.iterdir() if path.name.startswith("checkpoint-"))
    for path in found:
        load_run_state(path)
    return [path.name for path in found]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcome(trained(tmp_path_factory.mktemp("whole")))


# Each save calls torch.save for the arguments, optimizer, scheduler and random states: 4 times.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "nth", "left"),
    [("torch.save", 10, 2), ("torch.save done", 3, 0), ("manifest", 3, 2), ("rename", 2, 1)],
)
def test_killed_while_saving(tmp_path: Path, uninterrupted: dict[str, Any], where: str, nth: int, left: int) -> None:
    done = run_python(KILLED, tmp_path, where, nth)
    assert done.returncode == -9, done.stderr
    assert whole(tmp_path) == [f"checkpoint-{step}" for step in range(1, left + 1)]
    resumed = trained(tmp_path, resume=True if left else None, save_strategy="steps", save_steps=1)
    assert_same(uninterrupted, resumed)
    assert whole(tmp_path) == [f"checkpoint-{step}" for step in range(1, 7)]
    assert not list(tmp_path.glob(".saving-*"))


@pytest.mark.parametrize("where", ["write_manifest", "rotate"])
def test_error_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A full disk, say: the error comes out, earlier checkpoints stay, nothing is left over."""
    import hf_ouroboros.hooks.checkpoints

    original, calls = getattr(hf_ouroboros.hooks.checkpoints, where), []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(hf_ouroboros.hooks.checkpoints, where, failing)
    with pytest.raises(OSError, match="No space left"):
        trained(tmp_path, save_strategy="steps", save_steps=1)
    assert whole(tmp_path) == [f"checkpoint-{step}" for step in range(1, 3 if where == "write_manifest" else 4)]
    assert not list(tmp_path.glob(".saving-*"))
