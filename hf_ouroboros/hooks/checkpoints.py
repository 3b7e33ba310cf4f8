"""Saving: Trainer's stock files and the run state, put together aside and appearing whole, by one run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..adapters import is_adapted
from ..adapters.describing import frozen_digests
from ..checkpoint import save_state_part, write_manifest
from ..checkpoint.fit import describe_run
from ..checkpoint.hashes import FileHashes, files_in
from ..checkpoint.lock import FolderLock
from ..checkpoint.placing import appearing_whole, clear_leftovers, rotate
from ..checkpoint.reading import RNG_STATE, SCHEDULER, TRAINER_STATE
from ..engine.state import RunState
from ..errors import OutputFolderError
from ..partition.owned_weights import without_progress_bars
from ..processes import saving
from ..processes.files import save_optimizer, save_weights
from ..user_files import output_folder
from .agreement import AgreementHooks
from .resuming import ResumeHooks


class CheckpointHooks(AgreementHooks, ResumeHooks):
    """Saving, on top of resuming. Where devices are processes, each writes and reads what it holds."""

    _staging_dir: str | None = None
    _save_due: bool = False
    _lock: FolderLock | None = None
    _hashes: FileHashes | None = None

    # ---- one run at a time ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in Trainer; a run that saves, or looks for the last checkpoint, has its output folder for itself.

        Raises:
            OutputFolderError: another run saves there, or it can't be written.
        """
        args = self.args
        saves = args.save_strategy != SaveStrategy.NO or args.enable_jit_checkpoint or resume_from_checkpoint is True
        self._resumed, self._run_dir, self._save_due = None, self._get_output_dir(trial), False
        with ExitStack() as stack:
            if saves:
                stack.enter_context(self._holding(self._run_dir))
            return super().train(
                resume_from_checkpoint=resume_from_checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
            )

    @contextmanager
    def _holding(self, run_dir: str) -> Iterator[None]:
        """The lock of a folder, held by the main process for all; where this run holds it already, nothing."""
        problem: OutputFolderError | None = None
        with ExitStack() as stack:
            if self._processes.is_main and self._lock is None:
                try:
                    lock = stack.enter_context(FolderLock(run_dir))
                    clear_leftovers(run_dir)
                    stack.callback(setattr, self, "_lock", None)
                    self._lock = lock
                except OutputFolderError as error:
                    problem = error
            message = self._processes.broadcast(None if problem is None else str(problem))
            if problem is None and message:
                problem = OutputFolderError(message)
            if problem is not None:
                raise problem
            yield

    # ---- saving ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer; a save that is due within an update is put off to its end."""
        control = self.control
        if self._running_engine.update_open:  # an epoch of data without a length may end within an update
            self._save_due |= control.should_save
            control.should_save = False
        elif self._save_due:
            control.should_save, self._save_due = True, False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        engine = self._running_engine
        if engine.update_open:
            # Asked for within an update (a just-in-time checkpoint): Trainer saves as soon as the update is closed.
            self._save_due = True
            return
        state = None if self.args.save_only_model else engine.state_dict()
        run_dir = super()._get_output_dir(trial)
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with (
            self._processes.guard(f"saving {folder}"),
            self._holding(run_dir),
            self._putting_together(run_dir) as staging,
        ):
            with closing(FileHashes(staging / folder)) as hashes:
                self._hashes = hashes
                super()._save_checkpoint(model, trial)
                self._name_best_checkpoint(run_dir)
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(staging, folder, TRAINER_STATE))
                self._complete(staging / folder, state, hashes)
            self._hashes = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, folder))
        if self.args.should_save:
            rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    @contextmanager
    def _putting_together(self, run_dir: str) -> Iterator[Path]:
        """A directory, the same for all processes, whose contents move into `run_dir` when all are done."""
        processes = self._processes
        try:
            with ExitStack() as stack:
                staging = None
                if processes.is_main:
                    self._own_lock.check()
                    staging = stack.enter_context(appearing_whole(run_dir))
                self._staging_dir = processes.broadcast(str(staging))
                yield Path(self._staging_dir)
                processes.barrier()  # all have written
                if processes.is_main:
                    self._own_lock.check()
            processes.barrier()  # it is in its place
        finally:
            self._staging_dir = self._hashes = None

    @property
    def _own_lock(self) -> FolderLock:
        """The lock that the main process holds while it saves."""
        assert self._lock is not None  # `_holding` is around it
        return self._lock

    def _complete(self, directory: Path, state: RunState | None, hashes: FileHashes) -> None:
        """The run state, if it is to be saved, and the manifest; all files are on the disk then."""
        processes = self._processes
        directory.mkdir(parents=True, exist_ok=True)
        parts = []
        if state is not None:
            device = None if processes.alone else processes.device_index
            parts = [save_state_part(directory, state, processes.replica, device)]
        processes.gather_files(directory, [part.file for part in parts], hashes)
        gathered = processes.gather((parts, dict(hashes.results()), frozen_digests(self.model)))
        parts = [part for theirs, _, _ in gathered for part in theirs]
        known = {name: digest for _, theirs, _ in gathered for name, digest in theirs.items()}
        frozen = {name: digest for _, _, theirs in gathered for name, digest in theirs.items()}
        if not processes.is_main:
            return
        hashes.add(name for name in files_in(directory) if name not in known)
        known |= hashes.results()
        if state is not None:
            staged = self._face
            run = describe_run(self.model, staged.optimizer, staged.compensation, self.lr_scheduler, frozen)
            write_manifest(directory, parts, processes.replicas, run, known)

    def _get_output_dir(self, trial: Any) -> str:
        """The run's directory; while a checkpoint is being written, the directory where it is put together."""
        return self._staging_dir or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in Trainer, but not while the checkpoint is still being put together."""
        if self._staging_dir is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _name_best_checkpoint(self, run_dir: str) -> None:
        """The best checkpoint by its final name: Trainer only saw the directory it was put together in."""
        best = getattr(self.state, "best_global_step", None)
        if best:
            path = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{best}")
            if os.path.exists(path) or best == self.state.global_step:
                self.state.best_model_checkpoint = path

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the complete model as `Trainer.save_model` does, after all stages have finished.

        Where devices are processes, all of them have to call it: each writes the parameters that it holds.
        """
        with self._processes.guard("saving the model"):
            if not _internal_call:
                self._agree("save_model()")
            self.synchronize()
            if self._processes.alone:
                super().save_model(output_dir, _internal_call)
                return
            self._save(output_dir)  # older Trainers would call it in the main process only
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        directory = output_folder(self.args) if output_dir is None else Path(output_dir)
        hashes = self._hashes if self._hashes is not None and self._hashes.directory == directory else None
        if self._processes.alone:
            super()._save(output_dir, state_dict)
            if hashes is not None:
                hashes.add()
            return
        if is_adapted(self.model):
            adapters = saving.gathered(self.model, directory, self._processes)
            if self.args.should_save:
                super()._save(str(directory), adapters)
            self._processes.barrier()
            return
        if self.args.should_save:
            # Everything but the weights, as the library writes it.
            with without_progress_bars():
                super()._save(str(directory), state_dict={})
            for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
                (directory / name).unlink(missing_ok=True)
        save_weights(self.model, directory, self._processes, hashes)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._processes.alone:
            super()._save_optimizer_and_scheduler(output_dir)
            if self._hashes is not None:
                self._hashes.add()
            return
        files = save_optimizer(self._made_optimizer.state_dict(), Path(output_dir), self._processes)
        self._processes.gather_files(Path(output_dir), files, self._hashes)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    def _save_rng_state(self, output_dir: str) -> None:
        """As in Trainer, under the name that a single process would use: dropout masks don't depend on it."""
        if self._processes.is_main:
            super()._save_rng_state(output_dir)
            os.replace(os.path.join(output_dir, self._processes.rng_file), os.path.join(output_dir, RNG_STATE))
