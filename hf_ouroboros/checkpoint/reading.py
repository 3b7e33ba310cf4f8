"""The one place that reads checkpoints: whatever is wrong with a file becomes a CheckpointError that names it."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import CONFIG_NAME, logging

from ..engine.state import RunState
from ..errors import CheckpointError
from .manifest import Manifest, find_changes, is_adapter, is_weights, read_manifest
from .run_state import read_run_state
from .trainer_state import check_trainer_state
from .weights import SavedTensor, saved_weights

SCHEDULER = "scheduler.pt"
RNG_STATE = "rng_state.pth"
TRAINER_STATE = "trainer_state.json"

logger = logging.get_logger(__name__)


class Checkpoint:
    """A checkpoint whose files are as they were written, or whose changes the user has accepted.

    Args:
        directory: where it is.
        manifest: of it.
        changes: what is not as it was written: file -> what is different.
        accept_changed: whether files that a user may change may have been changed: all but those with gradients to come.
            They still have to be readable, and to fit.

    Raises:
        CheckpointError: files have changed.
    """

    def __init__(
        self, directory: str | Path, manifest: Manifest, changes: Mapping[str, str], accept_changed: bool = False
    ):
        self.directory = Path(directory)
        self.manifest = manifest
        self._changes = dict(changes)
        listed = ", ".join(f"{name} {what}" for name, what in sorted(changes.items()))
        own = sorted(manifest.part_files & changes.keys())
        if own:
            raise CheckpointError(f"checkpoint {directory} is damaged: {listed}")
        if changes and not accept_changed:
            raise CheckpointError(
                f"checkpoint {directory} is damaged, or was changed: {listed}. If you have changed it on purpose, resume "
                "with resume_changed='accept'"
            )
        if changes:
            logger.warning(f"resume_changed='accept': checkpoint {directory} is taken although {listed}")

    @classmethod
    def open(cls, directory: str | Path, accept_changed: bool = False) -> Checkpoint:
        """Reads the manifest, and all files once, of a checkpoint.

        Raises:
            CheckpointError: it is damaged.
        """
        manifest = read_manifest(directory)
        return cls(directory, manifest, find_changes(directory, manifest), accept_changed)

    # ---- what it holds ----

    def run_state(self, stages: Collection[int] | None = None, replica: int = 0, replicas: int = 1) -> RunState:
        """Clocks, gradients to come, memories; arguments as for `read_run_state`."""
        return read_run_state(self.directory, self.manifest, stages, replica, replicas)

    def weights(self) -> dict[str, SavedTensor]:
        """What the model's files hold, from their headers."""
        if adapters := [name for name in self.manifest.files if is_adapter(name)]:
            parts = {file: saved_weights(self.directory, [file]) for file in adapters}
            return {f"{file}: {name}": found for file, part in parts.items() for name, found in part.items()}
        files = [name for name in self.manifest.files if is_weights(name)]
        whole = files and all((self.directory / name).is_file() for name in files)
        return saved_weights(self.directory, files if whole else None)  # else: saved again in other files

    def trainer_state(self) -> dict[str, Any]:
        """Trainer's own state.

        Raises:
            CheckpointError: it is damaged, or of another step than the rest.
        """
        state = self._json(TRAINER_STATE)
        try:
            check_trainer_state(state)
        except ValueError as error:
            raise CheckpointError(f"{self.directory / TRAINER_STATE} is damaged: {error}") from error
        if state["global_step"] != self.manifest.update:
            raise CheckpointError(
                f"{self.directory / TRAINER_STATE} is of step {state['global_step']}, but the checkpoint of step "
                f"{self.manifest.update}: it is damaged, or its files are of different checkpoints"
            )
        return state

    def scheduler(self) -> dict[str, Any]:
        """State of the learning rate's scheduler."""
        state = self._torch(SCHEDULER)
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise CheckpointError(f"{self.directory / SCHEDULER} is damaged: it holds no scheduler's state")
        return state

    def rng_state(self) -> bytes:
        """The file with the states of the random number generators, which can be read and set."""
        state = self._torch(RNG_STATE)
        try:
            random.Random().setstate(state["python"])
            numpy.random.RandomState().set_state(state["numpy"])
            torch.Generator().set_state(state["cpu"])
            return (self.directory / RNG_STATE).read_bytes()
        except Exception as error:  # the generators raise what they happen to raise
            raise CheckpointError(
                f"{self.directory / RNG_STATE} is damaged: {type(error).__name__}: {error}"
            ) from error

    def optimizer(self, wanted: Callable[[int], bool] = lambda index: True) -> dict[str, Any]:
        """The optimizer's state, of one process or several, of the parameters that are wanted.

        Args:
            wanted: tells for a parameter's index in the optimizer whether its state is needed here.
        """
        state: dict[str, Any] = {"state": {}}
        files = sorted(n for n in self.manifest.files if n.startswith("optimizer") and n.endswith(".pt"))
        for name in files or ["optimizer.pt"]:
            part = self._torch(name, mmap=True)
            try:
                state["param_groups"] = part["param_groups"]
                for group in part["param_groups"]:
                    list(group["params"])
                for index, entry in part["state"].items():
                    if wanted(index):
                        # Copies: the mapped file may be deleted while the run goes on.
                        state["state"][index] = {k: v.clone() if torch.is_tensor(v) else v for k, v in entry.items()}
            except (KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise CheckpointError(f"{self.directory / name} is damaged: {type(error).__name__}: {error}") from error
        return state

    def read_all(self, stages: Collection[int] | None = None, replica: int = 0, replicas: int = 1) -> RunState:
        """Reads everything that a run would need once, so that whatever is wrong is found before anything is loaded.

        Args:
            stages, replica, replicas: whose run state to return; as for `read_run_state`.

        Raises:
            CheckpointError: names the file.
        """
        self.trainer_state()
        self.scheduler()
        self.rng_state()
        self.weights()
        self.optimizer(lambda index: False)
        self._check_changed()
        return self.run_state(stages, replica, replicas)

    # ---- inside ----

    def _check_changed(self) -> None:
        """Of files that were changed on purpose, what tells damage: archives have checksums, JSON a form."""
        for name in self._changes:
            path = self.directory / name
            if name.endswith((".pt", ".pth", ".bin")) and path.is_file():
                try:
                    with zipfile.ZipFile(path) as archive:
                        broken = archive.testzip()
                except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
                    raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
                if broken is not None:
                    raise CheckpointError(f"{path} is damaged: the checksum of {broken} in it differs")
            elif name == CONFIG_NAME or (name.endswith(".json") and path.exists()):
                self._json(name)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.directory / name} can't be read: {type(error).__name__}: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.directory / name} is damaged: {type(value).__name__} instead of an object")
        return value

    def _torch(self, name: str, mmap: bool = False) -> Any:
        try:
            with safe_globals():
                return torch.load(self.directory / name, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # torch.load raises what its readers happen to raise
            raise CheckpointError(f"{self.directory / name} can't be read: {type(error).__name__}: {error}") from error
