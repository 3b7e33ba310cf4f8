"""The manifest of a checkpoint: which files it has, their checksums, the clocks of the run, and what the run was.

It is written last, so that a folder with a manifest is complete, and has a checksum of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..engine.state import check_format
from ..errors import CheckpointError
from .hashes import FileDigest, digests_of, files_in

STATE_META = "ouroboros_state.json"


@dataclass(frozen=True)
class StatePart:
    """A file with pending gradients and memories.

    Args:
        file: its name.
        replica: whose they are.
        meta: `RunState.meta()` of the process that wrote it.
    """

    file: str
    replica: int
    meta: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself, checked.

    Args:
        files: name -> size and checksum of every file but the manifest itself.
        meta: `RunState.meta()` but for the streams, with `replicas` and `parts`.
        run: what the run was, for comparison with the one that resumes (`hf_ouroboros.checkpoint.fit`).
    """

    files: Mapping[str, FileDigest]
    meta: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def update(self) -> int:
        """Updates so far."""
        return self.meta["update"]

    @property
    def part_files(self) -> set[str]:
        """Files with pending gradients and memories."""
        return {part["file"] for part in self.meta["parts"]}

    def weights_only(self) -> Manifest:
        """The same of the model's weights alone."""
        return replace(self, files={name: digest for name, digest in self.files.items() if is_weights(name)})


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint holds weights of the model, or of its adapters."""
    return (name.startswith("model") and name.endswith(".safetensors")) or is_adapter(name)


def is_adapter(name: str) -> bool:
    """Whether a file of a checkpoint holds weights of adapters: PEFT has one for each, in folders of their names."""
    return PurePosixPath(name).name == "adapter_model.safetensors"


def write_manifest(
    directory: str | Path,
    parts: Sequence[StatePart],
    replicas: int,
    run: Mapping[str, Any] | None = None,
    hashed: Mapping[str, FileDigest] | None = None,
) -> None:
    """Writes what makes a checkpoint complete, last of all.

    Args:
        directory: the checkpoint, with all other files in it.
        parts: of all processes.
        replicas: R.
        run: what the run is; see `hf_ouroboros.checkpoint.fit`.
        hashed: files whose checksums are known already; the others are read.
    """
    directory = Path(directory)
    names = [name for name in files_in(directory) if name != STATE_META]
    known = dict(hashed or {})
    for name, digest in digests_of(directory, [name for name in names if name not in known]).items():
        if isinstance(digest, OSError):
            raise digest
        known[name] = digest
    ticks = {stage: entries for part in parts for stage, entries in part.meta["pending_ticks"].items()}
    listed = [{"file": part.file, "replica": part.replica, "streams": part.meta["streams"]} for part in parts]
    meta = {**parts[0].meta, "pending_ticks": ticks, "replicas": replicas, "parts": listed, "run": dict(run or {})}
    del meta["streams"]  # each replica has its own
    meta["files"] = {name: asdict(known[name]) for name in names}
    meta["checksum"] = _checksum(meta)
    with open(directory / STATE_META, "w", encoding="utf-8") as file:
        file.write(json.dumps(meta, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"checkpoint {directory} does not exist, or is not a directory; of several hosts, each needs a copy"
        )
    try:
        meta = json.loads((directory / STATE_META).read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise ValueError("not an object")
        check_format(meta)
        if meta.pop("checksum", None) != _checksum(meta):
            raise ValueError("its own checksum differs")
        files = {name: FileDigest(**entry) for name, entry in meta.pop("files").items()}
        manifest = Manifest(files, meta, meta.pop("run"))
        _check(manifest)
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {STATE_META}: it was not written by OuroborosTrainer, or with save_only_model=True. "
            "It can't be resumed exactly; load the model from it and start a new run"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"{directory / STATE_META}: {error}") from error
        raise CheckpointError(f"{directory / STATE_META} is damaged: {type(error).__name__}: {error}") from error
    return manifest


def _checksum(meta: Mapping[str, Any]) -> str:
    """Of everything but the checksum itself; how the JSON is laid out does not matter."""
    text = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check(manifest: Manifest) -> None:
    """Refuses what can't be a manifest, whoever wrote it.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: something is missing, or has another type or range.
    """
    meta = manifest.meta
    tick = _count(meta, "tick")
    stages, start = _count(meta, "num_stages", 1), meta["delay_start"]
    _count(meta, "update", 0, tick)
    _count(meta, "replicas", 1)
    if type(meta["seed"]) is not int or not isinstance(meta["tied_gradient"], str):
        raise ValueError(f"seed {meta['seed']!r}, tied_gradient {meta['tied_gradient']!r}")
    if start is not None:
        _count(meta, "delay_start", 0, tick)
    if not isinstance(meta["parts"], list) or not meta["parts"] or not isinstance(manifest.run, dict):
        raise TypeError(f"parts is {meta['parts']!r}, run is {manifest.run!r}")
    for stage, ticks in meta["pending_ticks"].items():
        if int(stage) not in range(stages) or any(type(t) is not int or t not in range(tick) for t in ticks):
            raise ValueError(f"pending_ticks of stage {stage} are {ticks}")
    for part in meta["parts"]:
        _count(part, "replica", 0, meta["replicas"] - 1)
        if part["file"] not in manifest.files:
            raise ValueError(f"{part['file']!r} is not among its files")
        for group, (width, segment) in part["streams"].items():
            if int(group) < 0 or type(width) is not int or width < 1 or type(segment) is not int or segment < 0:
                raise ValueError(f"streams has {group!r}: {[width, segment]}")
    for name, digest in manifest.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts:
            raise ValueError(f"{name!r} is no file of a checkpoint")
        if type(digest.bytes) is not int or digest.bytes < 0 or not re.fullmatch("[0-9a-f]{64}", digest.sha256):
            raise ValueError(f"{name!r} has {digest}")


def _count(meta: Mapping[str, Any], name: str, least: int = 0, most: int | None = None) -> int:
    value = meta[name]
    if type(value) is not int or value < least or (most is not None and value > most):
        raise ValueError(f"{name} is {value!r}")
    return value


def find_changes(directory: str | Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> dict[str, str]:
    """Files that are not as they were written: name -> what is different.

    Args:
        directory: the checkpoint.
        manifest: of the checkpoint.
        share: (index, count) of this process among those that read the files of this host together: each reads some.
    """
    directory, changes, same_size = Path(directory), {}, []
    for name, digest in manifest.files.items():
        path = directory / name
        try:
            found = path.stat().st_size if path.is_file() else None
        except OSError as error:
            changes[name] = f"can't be read ({error})"
            continue
        if found is None:
            changes[name] = "is not a file" if path.exists() else "is missing"
        elif found != digest.bytes:
            changes[name] = f"has {found} bytes instead of {digest.bytes}"
        else:
            same_size.append(name)
    # The large ones first, dealt out in turn: then the shares are about equal.
    same_size.sort(key=lambda name: (-manifest.files[name].bytes, name))
    for name, read in digests_of(directory, same_size[share[0] :: share[1]]).items():
        if isinstance(read, OSError):
            changes[name] = f"can't be read ({read})"
        elif read != manifest.files[name]:
            changes[name] = "has another content (its SHA-256 differs)"
    return changes
