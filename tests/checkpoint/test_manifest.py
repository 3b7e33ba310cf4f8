"""The manifest and the run state: what is written comes back, and what can't have been written is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import assert_same

import hf_ouroboros.checkpoint.manifest
from hf_ouroboros import CheckpointError
from hf_ouroboros.checkpoint import (
    STATE_META,
    STATE_TENSORS,
    load_run_state,
    save_run_state,
    save_state_part,
    write_manifest,
)
from hf_ouroboros.checkpoint.hashes import FileHashes, digest_of, files_in
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


# key, or path to it -> values that it can't have, even where the manifest's own checksum is right
WRONG: dict[tuple, list[Any]] = {
    ("format",): [3, 99, None, "4", True],
    ("num_stages",): [0, -1, None, 2.0, "3", True],
    ("tick",): [-1, None, 4, 1e30],
    ("update",): [-1, 6, None, 0.5],
    ("delay_start",): [-1, 6, "0", 0.0],
    ("seed",): [None, 0.5, "a"],
    ("tied_gradient",): [None, 3],
    ("replicas",): [0, None, "1", 1.0],
    ("pending_ticks",): [None, [], {"0": [3, 9]}, {"0": [-1]}, {"9": []}, {"a": []}, {"0": 3}, {"0": ["3"]}],
    ("parts",): [None, {}, [None], [{"file": STATE_TENSORS, "replica": 1, "streams": {}}]],
    ("parts", 0, "file"): ["absent.safetensors", None, "../elsewhere"],
    ("parts", 0, "streams"): [None, {"0": [0, 1]}, {"0": [1, -1]}, {"-1": [1, 1]}, {"0": [1]}, {"0": [1.0, 1]}],
    ("files",): [None, [], {"../a": {"bytes": 1, "sha256": "0" * 64}}, {"/a": {"bytes": 1, "sha256": "0" * 64}}],
    ("files", STATE_TENSORS): [None, {}, 3, {"bytes": -1, "sha256": "0" * 64}, {"bytes": 8, "sha256": "x"}],
    ("run",): [None, [], 3],
}
GONE = object()


@pytest.mark.parametrize("where", WRONG, ids=str)
def test_wrong_entries(tmp_path: Path, where: tuple) -> None:
    save_run_state(tmp_path, run_state())
    text = (tmp_path / STATE_META).read_text()
    for wrong in [*WRONG[where], GONE]:
        meta = json.loads(text)
        inner = meta
        for key in where[:-1]:
            inner = inner[key]
        if wrong is GONE:
            del inner[where[-1]]
        else:
            inner[where[-1]] = wrong
        del meta["checksum"]
        meta["checksum"] = hf_ouroboros.checkpoint.manifest._checksum(meta)
        (tmp_path / STATE_META).write_text(json.dumps(meta))
        with pytest.raises(CheckpointError, match=r"ouroboros_state"):
            load_run_state(tmp_path)
    (tmp_path / STATE_META).write_text(text.replace("  ", "\t"))
    assert load_run_state(tmp_path).tick == 5, "how it is laid out does not matter"


@pytest.mark.parametrize("key", ["tick", "seed", "num_stages", "checksum"])
def test_the_manifest_has_a_checksum(tmp_path: Path, key: str) -> None:
    save_run_state(tmp_path, run_state())
    meta = json.loads((tmp_path / STATE_META).read_text())
    meta[key] = meta[key] + 1 if isinstance(meta[key], int) else "0" * 64
    (tmp_path / STATE_META).write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"ouroboros_state\.json is damaged: .*checksum"):
        load_run_state(tmp_path)


def test_deep_json(tmp_path: Path) -> None:
    save_run_state(tmp_path, run_state())
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"format": 4, "tick": ' + "9" * 10_000 + "}"):
        (tmp_path / STATE_META).write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
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


# ---- hashes ----


def test_hashes_in_a_thread(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b", ".hidden"):
        (tmp_path / name).write_text(name * 1000)
    hashes = FileHashes(tmp_path)
    hashes.add(["a"])
    hashes.add()
    found = hashes.results()
    hashes.close()
    assert set(found) == {"a", "sub/b"} == set(files_in(tmp_path))
    assert found == {name: digest_of(tmp_path / name) for name in found}
    assert found["a"].bytes == 1000


def test_what_was_hashed_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    part = save_state_part(tmp_path, run_state())
    wrong = digest_of(tmp_path / part.file)
    write_manifest(tmp_path, [part], 1, hashed={"a": wrong})
    assert json.loads((tmp_path / STATE_META).read_text())["files"]["a"]["sha256"] == wrong.sha256
    with pytest.raises(CheckpointError, match="a has 1 bytes instead of"):
        load_run_state(tmp_path)
