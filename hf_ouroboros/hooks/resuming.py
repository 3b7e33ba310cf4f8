"""Resuming: a checkpoint is read, and found to fit, before anything is loaded; a finished run stays finished."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers.trainer_utils import TrainOutput

from ..checkpoint.earlier import advice
from ..checkpoint.fit import check_run, describe_run
from ..checkpoint.manifest import STATE_META, find_changes, read_manifest
from ..checkpoint.placing import keep_only
from ..checkpoint.reading import Checkpoint
from ..checkpoint.trainer_state import best_checkpoint
from ..engine.state import RunState
from ..errors import CheckpointError, CheckpointMismatchError
from ..processes import saving
from .interfaces import SplitTrainer
from .position import position

T = TypeVar("T")


class ResumeHooks(SplitTrainer):
    """All reading of checkpoints. Where devices are processes, they agree on what they found."""

    _run_dir: str
    _resumed: Checkpoint | None = None
    _resumed_state: RunState | None = None
    _resumed_rng: bytes | None = None
    _resumed_best: str | None = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._split_if_changed()
        self.create_optimizer()
        self._face_optimizer()  # as `train` would a moment later: nothing is loaded before all is known to fit
        checkpoint = self._open(Path(resume_from_checkpoint))
        own_stages = [k for k in range(self.stage_plan.num_stages) if self._partition.is_here(k)]
        replica, replicas = self._processes.replica, self._processes.replicas

        state = self._agreed(lambda: checkpoint.read_all(own_stages, replica, replicas), resume_from_checkpoint)
        self._resumed_state = state
        self._resumed_rng = checkpoint.rng_state()
        saved = self._agreed(lambda: self._fitting(checkpoint, state, own_stages))
        self._agreed(lambda: saving.load(self.model, checkpoint.directory, saved), resume_from_checkpoint)
        self._resumed = checkpoint

    def _open(self, directory: Path) -> Checkpoint:
        """The checkpoint, its files read once by the processes of each host together."""
        manifest = self._agreed(lambda: read_manifest(directory), directory)
        found = self._processes.gather(find_changes(directory, manifest, self._processes.share_of_host))
        changes = {name: what for theirs in found for name, what in theirs.items()}
        accept = self.options.resume_changed == "accept"
        return self._agreed(lambda: Checkpoint(directory, manifest, changes, accept), directory)

    def _fitting(self, checkpoint: Checkpoint, state: RunState, own_stages: list[int]) -> Any:
        """Its weights, once everything in it is known to be of a run like this one.

        Raises:
            CheckpointMismatchError: says what differs.
        """
        saved = saving.look_at(self.model, checkpoint.directory, checkpoint.weights)
        saving.check(self.model, saved, checkpoint.directory)
        settings = self.options.engine_settings(self.stage_plan.num_workers)
        state.check(self._partition, settings, own_stages)
        staged = self._face
        check_run(checkpoint.manifest.run, describe_run(self.model, staged.optimizer, staged.compensation))
        try:
            self._resumed_best = best_checkpoint(checkpoint.trainer_state(), checkpoint.directory)
        except FileNotFoundError as error:
            self._resumed_best = None
            if self.args.load_best_model_at_end:
                raise CheckpointMismatchError(
                    f"the checkpoint of the best model so far is gone: {error}; put it beside {checkpoint.directory}, or "
                    "resume with load_best_model_at_end=False"
                ) from error
        return saved

    def _agreed(self, work: Callable[[], T], damaged: str | Path | None = None) -> T:
        """What `work` returns, if it succeeds in all processes; else all raise the same.

        Args:
            work: may raise CheckpointErrors.
            damaged: the checkpoint that these are about; the newest complete one before it is offered.
        """
        value: list[T] = []
        error = None
        try:
            value.append(work())
        except CheckpointError as caught:
            error = caught
        found = None if error is None else (str(error), isinstance(error, CheckpointMismatchError))
        failed = next((entry for entry in self._processes.gather(found) if entry is not None), None)
        if failed is None:
            return value[0]
        text, mismatch = failed
        if mismatch:
            raise CheckpointMismatchError(text) from error
        sentence = advice(damaged) if damaged is not None and self._processes.is_main else ""
        raise CheckpointError(text + self._processes.broadcast(sentence)) from error

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As in Trainer; the best model so far is beside the checkpoint, wherever that was moved to."""
        epochs_and_steps = super()._init_training_state(*args, **kwargs)
        if self._resumed is None:
            return epochs_and_steps
        self.state.best_model_checkpoint = self._resumed_best
        return position(self._resumed.trainer_state(), self.args, self.train_dataset, epochs_and_steps)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        resumed, self._resumed = self._resumed, None
        optimizer, scheduler, state = self._made_optimizer, self.lr_scheduler, self._resumed_state
        assert resumed is not None and state is not None  # `_load_from_checkpoint` comes before
        assert scheduler is not None  # so does the making of optimizer and scheduler
        here = [p for group in optimizer.param_groups for p in group["params"]]
        staged = self._face
        check_run(resumed.manifest.run, describe_run(self.model, staged.optimizer, staged.compensation, scheduler))

        def load() -> None:
            try:
                optimizer.load_state_dict(resumed.optimizer(lambda index: not here[index].is_meta))
                scheduler.load_state_dict(resumed.scheduler())
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(
                    f"the optimizer or scheduler in {checkpoint} can't be loaded: {type(error).__name__}: {error}"
                ) from error

        self._agreed(load, checkpoint)
        self._running_engine.load_state_dict(state)
        self._resumed_state = None

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """From what was read when the run was resumed, in a file with the name that Trainer expects."""
        if checkpoint is None:
            return
        assert self._resumed_rng is not None  # `_load_from_checkpoint` comes before
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, self._processes.rng_file).write_bytes(self._resumed_rng)
            super()._load_rng_state(folder)

    # ---- the end ----

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, but not after the last update: a finished run that is resumed stays as it is."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
            return
        self._load_rng_state(kwargs.get("resume_from_checkpoint"))
        self.control.should_training_stop = True

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # Trainer asks first
        best = Path(self.state.best_model_checkpoint)
        saved = self._agreed(lambda: self._unchanged_weights(best))
        self._agreed(lambda: saving.load(self.model, best, saved))
        self._remove_all_but_best()

    def _unchanged_weights(self, directory: Path) -> Any:
        if self.options.resume_changed == "refuse" and (directory / STATE_META).exists():
            manifest = read_manifest(directory)
            for name, what in find_changes(directory, manifest.weights_only()).items():
                raise CheckpointError(f"the best model, in {directory}, is damaged, or was changed: {name} {what}")
        return saving.look_at(self.model, directory)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> TrainOutput:
        if not self.args.load_best_model_at_end:
            self._remove_all_but_best()
        return super()._finalize_training(trial, *args, **kwargs)

    def _remove_all_but_best(self) -> None:
        """What Trainer does at the end of a run with save_total_limit=1, so that no half of a checkpoint is ever left."""
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            keep_only(self._run_dir, best)
