"""Checkpoints: Trainer's stock files and the run state, put together aside and appearing whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoint import (
    appearing_whole,
    load_run_state,
    offering_earlier,
    save_run_state,
    save_state_part,
    write_manifest,
)
from ..engine.state import RunState
from ..partition import Partition
from ..partition.loading import without_progress_bars
from ..processes import ProcessGrid
from ..processes.files import bring_home, load_optimizer, load_weights, save_optimizer, save_weights, together
from .agreement import AgreementHooks

SCHEDULER = "scheduler.pt"


class CheckpointHooks(AgreementHooks):
    """Saving and resuming. Where devices are processes, each writes and reads what it holds."""

    _grid: ProcessGrid | None
    _control_group: dist.ProcessGroup | None
    _partition: Partition
    _staging_dir: str | None = None
    _save_due: bool = False
    _resumed_state: RunState | None = None

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.engine.update_open:
            # Asked for within an update (a just-in-time checkpoint): Trainer saves as soon as the update is closed.
            self._save_due = True
            return
        state = None if self.args.save_only_model else self.engine.state_dict()
        run_dir = super()._get_output_dir(trial)
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._guarded(f"saving {folder}"), self._putting_together(run_dir) as staging:
            super()._save_checkpoint(model, trial)
            self._name_best_checkpoint(run_dir)
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staging, folder, "trainer_state.json"))
            if state is not None:
                self._save_run_state(staging / folder, state)
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, folder))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    @contextmanager
    def _putting_together(self, run_dir: str) -> Iterator[Path]:
        """A directory, the same for all processes, whose contents move into `run_dir` when all are done."""
        try:
            if self._grid is None:
                with appearing_whole(run_dir) as staging:
                    self._staging_dir = str(staging)
                    yield staging
                return
            message = [None]
            if self._grid.rank == 0:
                with appearing_whole(run_dir) as staging:
                    dist.broadcast_object_list([str(staging)], 0, group=self._control_group)
                    self._staging_dir = str(staging)
                    yield staging
                    dist.barrier(self._control_group)  # all have written
            else:
                dist.broadcast_object_list(message, 0, group=self._control_group)
                self._staging_dir = message[0]
                yield Path(message[0])
                dist.barrier(self._control_group)
            dist.barrier(self._control_group)  # it is in its place
        finally:
            self._staging_dir = None

    def _save_run_state(self, directory: Path, state: RunState) -> None:
        grid = self._grid
        if grid is None:
            save_run_state(directory, state)
            return
        directory.mkdir(parents=True, exist_ok=True)
        part = save_state_part(directory, state, grid.replica, grid.device_index)
        bring_home(directory, [part.file], grid, self._control_group)
        parts = together(grid, self._control_group, part)
        if grid.rank == 0:
            write_manifest(directory, parts, grid.replicas)

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
        with self._guarded("saving the model"):
            if not _internal_call:
                self._agree("save_model()")
            self.synchronize()
            if self._grid is None:
                super().save_model(output_dir, _internal_call)
                return
            self._save(output_dir)  # older Trainers would call it in the main process only
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._grid is None:
            super()._save(output_dir, state_dict)
            return
        directory = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            # Everything but the weights, as the library writes it.
            with without_progress_bars():
                super()._save(str(directory), state_dict={})
            for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
                (directory / name).unlink(missing_ok=True)
        save_weights(self.model, directory, self._grid, self._control_group)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._grid is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        files = save_optimizer(self.optimizer.state_dict(), Path(output_dir), self._grid)
        bring_home(Path(output_dir), files, self._grid, self._control_group)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    def _save_rng_state(self, output_dir: str) -> None:
        """As in Trainer, under the name that a single process would use: dropout masks don't depend on it."""
        if self._grid is None:
            super()._save_rng_state(output_dir)
        elif self._grid.rank == 0:
            super()._save_rng_state(output_dir)
            os.replace(os.path.join(output_dir, "rng_state_0.pth"), os.path.join(output_dir, "rng_state.pth"))

    # ---- resuming ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._partition.model is not self.model:
            self._split(self.model, self.args)
        settings = self.args.engine_settings(self.stage_plan.num_workers)
        held = [k for k in range(self.stage_plan.num_stages) if self._partition.is_here(k)]
        replica, replicas = (0, 1) if self._grid is None else (self._grid.replica, self._grid.replicas)
        # Refuse before anything is loaded over; the engine takes the state once it is there.
        with offering_earlier(resume_from_checkpoint):
            self._resumed_state = load_run_state(resume_from_checkpoint, held, replica, replicas)
            self._resumed_state.check(self._partition, settings, held)
            if self._grid is None:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self._grid is None:
            super()._load_best_model()
        else:
            load_weights(self.model, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with offering_earlier(checkpoint):
            here = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.optimizer.load_state_dict(load_optimizer(checkpoint, lambda index: not here[index].is_meta))
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER), weights_only=True))
        self.engine.load_state_dict(self._resumed_state)
        self._resumed_state = None

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._grid is None or checkpoint is None:
            super()._load_rng_state(checkpoint)
            return
        with tempfile.TemporaryDirectory() as folder:  # where Trainer finds the state under the name it expects
            shutil.copy(
                os.path.join(checkpoint, "rng_state.pth"), os.path.join(folder, f"rng_state_{self._grid.rank}.pth")
            )
            super()._load_rng_state(folder)
