"""OuroborosTrainer: Trainer's hooks on one side, the engine on the other, no algorithm in between."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from dataclasses import replace
from typing import Any

import torch
from accelerate import dispatch_model
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalPrediction, TrainOutput

from .adapters import base_of, check_adapters, check_quantized
from .arguments import OuroborosArguments
from .engine.optimizers import check_optimizer, check_trainable
from .errors import EngineError
from .hooks.agreement import facts_of_creation
from .hooks.batches import BatchHooks
from .hooks.callbacks import CallbackHooks, ScriptCallbacks
from .hooks.card import CardHooks
from .hooks.changes import ChangeHooks
from .hooks.checkpoints import CheckpointHooks
from .hooks.compiling import compilation_of
from .hooks.evaluation import EvaluationHooks
from .hooks.logs import LogHooks
from .hooks.moments import LateState, LossAtItsStep, MomentContext
from .hooks.optimizer import OptimizerHooks
from .hooks.preemption import SaveOnSigterm
from .hooks.timeline import TimelineHooks
from .hooks.touching import is_foreign
from .hub.card_facts import TAG
from .main_thread import MainThread, unwatched
from .partition import StagePlan, split_model, torch_device
from .partition.finite import check_finite
from .partition.meta import is_encoder_decoder
from .partition.trained import refresh
from .precision import autocast_dtype, check_surroundings, check_trained
from .processes.meeting import refusing
from .processes.processes import processes_of
from .reference_now import reference_of
from .schedules import SCHEDULES
from .simulate.timeline import Timeline
from .staged import StagedModel, refuse_forward


class OuroborosTrainer(
    ChangeHooks,
    CallbackHooks,
    CheckpointHooks,  # decides whether a save is due now, before LogHooks asks
    LogHooks,
    BatchHooks,
    OptimizerHooks,
    EvaluationHooks,
    TimelineHooks,
    CardHooks,
    Trainer,
):
    """A `Trainer` that splits the model into stages and trains them with delayed gradients, all devices busy.

    Same signature as `transformers.Trainer`. A script's own arguments stay what they are, as `args`; a plain
    `TrainingArguments` has the defaults of `OuroborosArguments` beside it (`options`). During training, call `synchronize()` before looking at the weights; after
    `train()`, `trainer.model` is the complete, ordinary model.

    Attributes:
        engine: the engine of the present or last `train()`; None before.
        stage_plan: stages, devices, delays, parameters and bytes; prints as a table.
        delay_compensation: what is done about the delay, "auto" being resolved.
        timeline: executed instructions of the last `train()` with `timeline=...`; None otherwise.

    Raises:
        UnsupportedModelError, DeviceMapError, UnsupportedOptionError: before any work starts.
        DisagreementError: processes of the run were given different things; RankFailedError: one of them refused.
    """

    @refusing()
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
        options = OuroborosArguments.from_training_arguments(args)
        self._beside = args, options
        functions = {
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        self._processes = processes_of(options, lambda: facts_of_creation(options, callbacks, **functions))
        self.engine = None
        self.timeline = None
        if model is not None:
            self._split(model, options)
        if optimizers[0] is not None:
            check_optimizer(optimizers[0], model.parameters() if model is not None else ())
        args._n_gpu = options.n_gpu  # at most 1: several devices are stages here, never `nn.DataParallel`
        # Trainer's own callback would save at once, in the middle of an update, and each process at a step of its own.
        save_on_sigterm, args.enable_jit_checkpoint = args.enable_jit_checkpoint, False
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
        args.enable_jit_checkpoint = save_on_sigterm
        self._take_over_counting()
        if save_on_sigterm:
            self.add_callback(SaveOnSigterm(self))
        if model is None:
            self._split(self.model, options)
        self._look_at_given_optimizer()
        self._remember_model()
        self.callback_handler = ScriptCallbacks(self.callback_handler, self)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Nothing: stages go to their own devices."""

    # ---- stages ----

    @property
    def stage_plan(self) -> StagePlan:
        """Which stage holds what, on which device, with which delay."""
        return self._partition.plan

    def _split(self, model: nn.Module, args: OuroborosArguments) -> None:
        self._agree_on_model(model, args)
        check_adapters(model, processes=not self._processes.alone)
        check_quantized(model, autocast_dtype(args))
        if not self._processes.alone:
            check_finite(model)  # in one process, the comparison of logits finds out
        inner: PreTrainedModel = base_of(model)  # a module of another kind is refused now
        memory: Any = args.max_memory  # text on the command line, and read by now
        schedule = SCHEDULES[args.schedule]
        self._partition = split_model(
            inner,
            args.device_names,
            args.device_map,
            args.num_stages,
            memory,
            delayed=not schedule.is_synchronous,
            colocate=not schedule.uses_devices,
            own_device=self._processes.own_device,
        )
        self._partition.evaluation_config(**args.evaluation_options)  # refuses what this model does not have
        dtype = args.engine_settings(self.stage_plan.num_workers).autocast_dtype
        self._agree_on_plan(args)
        with self._processes.guard("setting up"):
            relay = self._processes.connect(self._partition, dtype)
        if relay is not None:
            for whole in {inner, model}:
                refuse_forward(whole)
        self._staged = StagedModel(self._partition, dtype, relay, model)
        # Without it, Trainer counts one label too many per row of GPT-2 and the loss comes out too small.
        if not is_encoder_decoder(inner):
            inner.loss_type = "ForCausalLM"
        if hasattr(inner, "add_model_tags"):
            inner.add_model_tags([TAG])

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
            DisagreementError: processes of the run have different options, models, optimizers, or data.
            OutputFileError: the timeline can't be written where it is wanted.
        """
        with self._processes.guard("training"):
            self.options.check()
            self._check_timeline()
            trained = False
            try:
                with MainThread(self):
                    output = super().train(
                        resume_from_checkpoint=resume_from_checkpoint,
                        trial=trial,
                        ignore_keys_for_eval=ignore_keys_for_eval,
                    )
                self._make_model_usable()
                trained = True
            finally:
                self.is_in_train = False
                if self.engine is not None:
                    self.engine.close()
                if trained or self._processes.alone:  # after a failure nobody hears what others have executed
                    self._write_timeline()
            return output

    def _make_model_usable(self) -> None:
        """Lets `trainer.model` run by itself where its parts stay on several accelerators, as device_map="auto" does."""
        if not self._processes.alone:
            return
        device_map, model = self.stage_plan.device_map(), self._partition.model
        if len({torch_device(name) for name in device_map.values()}) > 1 and not hasattr(model, "hf_device_map"):
            dispatch_model(model, {name: torch_device(device) for name, device in device_map.items()})
            self._remember_model()

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        # Anything that is not self.model keeps Trainer from preparing it (DDP, device placement, gradient zeroing).
        if not self._pipeline_runs:
            self._split_if_changed()
        if training:
            self._face_optimizer()
            self._start_engine()
        return self._staged

    def _start_engine(self) -> None:
        staged = self._face
        if self.engine is not None:
            self.engine.close()
        plan = self.stage_plan
        self.timeline = Timeline(len(plan.devices), list(plan.devices)) if self.options.timeline else None
        settings = replace(
            self.options.engine_settings(plan.num_workers), compensations=self.delay_compensation.compensations
        )
        check_optimizer(staged.optimizer, self.model.parameters())
        check_trainable(staged.optimizer, self.model)
        check_trained(self.model.named_parameters(), settings.autocast_dtype)
        self._partition = refresh(self._partition)  # as parameters are frozen now
        self._partition.carry_hooks()
        self._partition.compile_layers(compilation_of(self.args))
        check_surroundings()
        self._look_at_script()
        self._look_at_optimizer()
        self._agree_on_training(settings, str(self.delay_compensation))
        self._warn_of_delay(staged.optimizer)
        common = self._partition, staged.optimizer, self._make_loss(), settings
        if settings.record.uses_devices:
            self.engine = self._processes.make_engine(*common, self.timeline)
        else:
            self.engine = reference_of(settings)(*common)
        staged.engine = self._staged.engine = self.engine
        self._start_ledger()

    def _make_loss(self) -> LossAtItsStep:
        """What the last stage does with its logits."""
        return LossAtItsStep(self)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Hands the micro-batch to the engine.

        Returns:
            Zero, as the loss is known later; the loss, which is waited for, where a subclass has a `training_step` of its own.
        """
        if self.engine is None or self.engine.closed:
            raise EngineError(
                "training_step() outside of train(): the stages' workers run in train() only; call train()"
            )
        if not self.model.training:  # nothing is in flight between modules: they were switched by an evaluation
            model.train()
        if not self._processes.alone or is_foreign(self, "_prepare_inputs") or is_foreign(self, "_prepare_input"):
            inputs = self._prepare_inputs(inputs)  # else the stages fetch what they need from the host's memory
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        context = MomentContext(num_items_in_batch, steps)
        context.moment, context.variables = (self.state.global_step, self.state.epoch), copy_context()
        self._take_settings()
        with unwatched():  # of the reference, whose stages compute in this thread
            tick = self.engine.submit(inputs, context)
        if self._script.has_training_step:
            self.engine.account_for_open()
            return torch.tensor(float(self._collect()[-1].loss), device=self.args.device)
        if self._script.rests_each_time:
            self.engine.rest()
        if self._tr_loss.device != self._nothing.device:  # Trainer looks at every loss that it is given
            self._tr_loss = self._tr_loss.to(self._nothing.device)
        self._ledger.open_tick(tick, self.state.global_step)
        self._take_reports()
        return self._nothing

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As in Trainer, with a state that can be asked by losses, too, which are computed later."""
        started = super()._init_training_state(*args, **kwargs)
        self.state.__class__ = LateState
        return started
