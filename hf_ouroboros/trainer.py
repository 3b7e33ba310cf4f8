"""OuroborosTrainer: Trainer's hooks on one side, the engine on the other, no algorithm in between."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import dispatch_model
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    EvalPrediction,
    TrainOutput,
    rotate_checkpoints,
)

from .arguments import OuroborosArguments
from .checkpoint import appearing_whole, load_run_state, save_run_state
from .engine.engine import Engine
from .engine.optimizers import check_optimizer
from .engine.state import RunState
from .hub.facts import TAG, collect_facts
from .ledger import LossLedger
from .partition import Partition, StagePlan, split_model, torch_device
from .reference import Reference
from .simulate.timeline import Timeline
from .staged import LogitsModel, StagedModel, StagedOptimizer


class LossContext(NamedTuple):
    """What the loss of a micro-batch needs from its update."""

    num_items: torch.Tensor | int | None
    accumulation_steps: int


class OuroborosTrainer(Trainer):
    """A `Trainer` that splits the model into stages and trains them with delayed gradients, all devices busy.

    Same signature as `transformers.Trainer`. A plain `TrainingArguments` is taken with the defaults of
    `OuroborosArguments` for the rest. During training, call `synchronize()` before looking at the weights; after
    `train()`, `trainer.model` is the complete, ordinary model.

    Attributes:
        engine: the engine of the present or last `train()`; None before.
        stage_plan: stages, devices, delays, parameters and bytes; prints as a table.
        timeline: executed instructions of the last `train()` with `timeline=...`; None otherwise.

    Raises:
        UnsupportedModelError, DeviceMapError, UnsupportedOptionError: before any work starts.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: OuroborosArguments | TrainingArguments | None = None,
        data_collator: Any | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ):
        args = OuroborosArguments(output_dir="tmp_trainer") if args is None else args
        args = OuroborosArguments.from_training_arguments(args)
        self.engine: Engine | Reference | None = None
        self.timeline: Timeline | None = None
        self._partition: Partition | None = None
        self._staged: StagedModel | None = None
        self._ledger = LossLedger()
        self._eval_sums: list[tuple[float, float]] | None = None
        self._staging_dir: str | None = None
        self._save_due = False
        self._resumed_state: RunState | None = None
        if model is not None:
            self._split(model, args)
        if optimizers[0] is not None:
            check_optimizer(optimizers[0], model.parameters() if model is not None else ())
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if model is None:
            self._split(self.model, args)

    # ---- stages ----

    @property
    def stage_plan(self) -> StagePlan:
        """Which stage holds what, on which device, with which delay."""
        return self._partition.plan

    def _split(self, model: nn.Module, args: OuroborosArguments) -> None:
        self._partition = split_model(
            model,
            args.device_names,
            args.device_map,
            args.num_stages,
            args.max_memory,
            delayed=args.schedule != "1f1b",
            colocate=args.schedule == "reference",
        )
        settings = args.engine_settings(self.stage_plan.num_workers)
        self._staged = StagedModel(self._partition, settings.autocast_dtype)
        # Without it, Trainer counts one label too many per row of GPT-2 and the loss comes out too small.
        model.loss_type = "ForCausalLM"
        if hasattr(model, "add_model_tags"):
            model.add_model_tags([TAG])

    def synchronize(self) -> None:
        """Waits until all stages have finished the newest micro-batch; then the weights may be looked at.

        Gradients that are still to come stay to come: looking does not change a run.
        """
        if self.engine is not None and self.is_in_train:
            self.engine.synchronize()

    # ---- training ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any | None = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; see `Trainer.train`.

        Raises:
            WorkerError: a device's worker failed; names device, instruction, stage and tick.
            CheckpointError: the checkpoint can't be resumed exactly.
        """
        try:
            output = super().train(
                resume_from_checkpoint=resume_from_checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
            )
            self._make_model_usable()
            return output
        finally:
            self.is_in_train = False
            if self.engine is not None:
                self.engine.close()
            if self.timeline is not None:
                self.timeline.write(self.args.timeline)

    def _make_model_usable(self) -> None:
        """Lets `trainer.model` run by itself where its parts stay on several accelerators, as device_map="auto" does."""
        device_map = self.stage_plan.device_map()
        if len({torch_device(name) for name in device_map.values()}) > 1 and not hasattr(self.model, "hf_device_map"):
            dispatch_model(self.model, {name: torch_device(device) for name, device in device_map.items()})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The complete optimizer, as Trainer makes it, behind a face that tells the engine about updates."""
        if self._staged_optimizer is not None:
            return self.optimizer
        super().create_optimizer()
        check_optimizer(self.optimizer, self.model.parameters())
        self.optimizer = StagedOptimizer(self.optimizer)
        return self.optimizer

    @property
    def _staged_optimizer(self) -> StagedOptimizer | None:
        """Our face of the optimizer, which accelerate wraps once more; None before it was made."""
        optimizer = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        return optimizer if isinstance(optimizer, StagedOptimizer) else None

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        # Anything that is not self.model keeps Trainer from preparing it (DDP, device placement, gradient zeroing).
        if self._partition.model is not self.model:
            self._split(self.model, self.args)
        if training:
            self._start_engine()
        return self._staged

    def _start_engine(self) -> None:
        staged = self._staged_optimizer
        if self.engine is not None:
            self.engine.close()
        plan = self.stage_plan
        self.timeline = Timeline(len(plan.devices), list(plan.devices)) if self.args.timeline else None
        kind = Reference if self.args.schedule == "reference" else Engine
        settings = self.args.engine_settings(plan.num_workers)
        self.engine = kind(self._partition, staged.optimizer, self._stage_loss, settings, self.timeline)
        staged.engine = self.engine
        self._ledger = LossLedger()
        self._save_due = False

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Hands the micro-batch to the engine; returns the sum of the losses that have come back meanwhile."""
        inputs = self._prepare_inputs(inputs)
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        tick = self.engine.submit(inputs, LossContext(num_items_in_batch, steps))
        self._ledger.open_tick(tick)
        if self.accelerator.gradient_state.sync_gradients:
            self._ledger.close_update()
        return self._collect_losses()

    def _stage_loss(self, logits: torch.Tensor, batch: dict[str, Any], context: LossContext) -> torch.Tensor:
        """Loss of a micro-batch on the last stage, by Trainer's own rules (labels, smoothing, custom losses)."""
        inputs = {
            key: value.to(logits.device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()
        }
        head = LogitsModel(self._partition.model, logits)
        loss = self.compute_loss(head, inputs, num_items_in_batch=context.num_items)
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = context.num_items is not None or self.compute_loss_func is not None
        return loss if scaled else loss / context.accumulation_steps

    def _collect_losses(self) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        for finished in self.engine.collect():
            loss = finished.loss.float().to(self.args.device)
            if self.args.logging_nan_inf_filter and not torch.isfinite(loss):
                loss = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
            self._ledger.add(finished.tick, loss.item())
            total += loss
        return total

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Number of target tokens of an update: labels after the shift that are not -100."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        targets = [
            batch["shift_labels"] if "shift_labels" in batch else batch["labels"][..., 1:] for batch in batch_samples
        ]
        return sum(target.ne(-100).sum() for target in targets).to(device)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Nothing: the workers clip."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Nothing: gradients are the workers'; the norm is logged from what they report."""

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if self.engine.update_open:  # an epoch of data without a length may end within an update
            self._save_due |= control.should_save
            control.should_save = False
        elif self._save_due:
            control.should_save, self._save_due = True, False
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self.synchronize()
        if control.should_log and self.state.global_step > self._globalstep_last_logged:
            tr_loss += self._collect_losses()
            grad_norm = self.engine.grad_norm
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.synchronize()
        self._tr_loss += self._collect_losses()
        return super()._finalize_training(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; a training loss is the mean over the updates whose losses have all come since the last log.

        Logging never waits for the pipeline: the first entries of a run may have no loss yet.
        """
        if self.is_in_train and "loss" in logs:
            mean = self._ledger.take_mean()
            if mean is None:
                del logs["loss"]
            else:
                logs["loss"] = mean
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in Trainer, at a synchronized pipeline; the loss is the mean over target tokens, not over batches."""
        self.synchronize()
        self._eval_sums = []
        try:
            output = super().evaluation_loop(*args, **kwargs)
            sums, prefix = self._eval_sums, kwargs.get("metric_key_prefix", "eval")
        finally:
            self._eval_sums = None
        tokens = sum(count for _, count in sums)
        if tokens and f"{prefix}_loss" in output.metrics:
            output.metrics[f"{prefix}_loss"] = sum(loss * count for loss, count in sums if count) / tokens
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """As in Trainer; remembers how many tokens the batch's loss stands for."""
        count = self._get_num_items_in_batch([inputs], self.args.device)
        result = super().prediction_step(model, inputs, *args, **kwargs)
        # A custom loss need not be a mean over tokens; then Trainer's mean over rows stays.
        stock = self.compute_loss_func is None and type(self).compute_loss is Trainer.compute_loss
        if stock and self._eval_sums is not None and count is not None and result[0] is not None:
            if torch.isfinite(result[0]) or not self.args.logging_nan_inf_filter:
                self._eval_sums.append((result[0].item(), count.item()))
        return result

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.engine.update_open:
            # Asked for within an update (a just-in-time checkpoint): Trainer saves as soon as the update is closed.
            self._save_due = True
            return
        state = None if self.args.save_only_model else self.engine.state_dict()
        run_dir = super()._get_output_dir(trial)
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with appearing_whole(run_dir) as staging:
                self._staging_dir = str(staging)
                super()._save_checkpoint(model, trial)
                self._staging_dir = None
                self._name_best_checkpoint(run_dir)
                self.state.save_to_json(os.path.join(staging, folder, "trainer_state.json"))
                if state is not None:
                    save_run_state(staging / folder, state)
        finally:
            self._staging_dir = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, folder))
        rotate_checkpoints(
            output_dir=run_dir,
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.engine.load_state_dict(self._resumed_state)
            self._resumed_state = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._partition.model is not self.model:
            self._split(self.model, self.args)
        settings = self.args.engine_settings(self.stage_plan.num_workers)
        # Refuse before anything is loaded over; the engine takes the state once it is there.
        self._resumed_state = load_run_state(resume_from_checkpoint)
        self._resumed_state.check(self._partition, settings)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the complete model as `Trainer.save_model` does, after all stages have finished."""
        self.synchronize()
        super().save_model(output_dir, _internal_call)

    # ---- the Hub ----

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **facts: Any,
    ) -> None:
        """Writes `README.md` into the output directory: method, split, delays, data, results, citation.

        Args:
            facts: further fields of `hf_ouroboros.hub.CardFacts`, which win over what the trainer knows.
        """
        from .hub.card import build_card

        if not self.is_world_process_zero():
            return
        known = collect_facts(
            self,
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            base_model=finetuned_from,
            dataset_id=dataset_tags,
            dataset_name=dataset,
            **facts,
        )
        path = Path(self.args.output_dir) / "README.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        build_card(known).save(path)
