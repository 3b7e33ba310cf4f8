"""Contenders that are Trainers: the stock one, alone or under DistributedDataParallel, and ours."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_ouroboros import OuroborosArguments, OuroborosTrainer, split_model
from hf_ouroboros.schedules import SCHEDULES

from .clock import Clock
from .contenders import ContenderError
from .job import Job, build_model, common_arguments, muon, muon_matrices
from .measure import peak_memory_mib, steady_state
from .options import SETTLING_TICKS
from .text import Blocks, read_blocks


class Measured:
    """Mix-in: rows in the order of the data, and a clock that evaluations don't touch."""

    clock: Clock

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See `Trainer.evaluate`."""
        with self.clock.paused():
            return super().evaluate(*args, **kwargs)


class MeasuredTrainer(Measured, Trainer):
    """The stock Trainer."""


class MeasuredOuroborosTrainer(Measured, OuroborosTrainer):
    """Ours."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See `Trainer.evaluate`; the clock runs until the pipeline is empty."""
        self.synchronize()
        return super().evaluate(*args, **kwargs)


class Timekeeper(TrainerCallback):
    """Tells the clock about updates and evaluations, and ends a run that has reached its target."""

    def __init__(self, clock: Clock, target: float | None):
        self.clock, self.target = clock, target

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer after every update."""
        self.clock.update_ended()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Called by Trainer after every evaluation, with the same metrics in all processes."""
        loss = metrics["eval_loss"]
        self.clock.evaluations.append((state.global_step, self.clock.now(), loss))
        control.should_training_stop |= self.target is not None and loss <= self.target


def run(job: Job, world_size: int) -> dict[str, Any]:
    """Trains; returns the measurements (equal in all processes, the memory included)."""
    options, contender = job.options, job.contender
    given = common_arguments(job)
    # Evaluations are no part of the schedule, and a timeline keeps every instruction: not in long runs.
    records = contender.is_ours and SCHEDULES[contender.kind].uses_devices and not job.evaluate
    if job.evaluate:
        given |= {"eval_strategy": "steps", "eval_steps": options.eval_every}
    if contender.kind == "ddp":
        given["gradient_accumulation_steps"] = contender.micro_batches // world_size
    model = build_model(job)
    # The names before the model is dispatched, which may exchange the parameters.
    matrices = muon_matrices(model) if options.optimizer == "muon" else []
    train, validation = map(Blocks, read_blocks(job))
    if contender.is_ours:
        given |= {"schedule": contender.kind, "devices": options.devices, "device_map": options.device_map}
        if options.optimizer == "muon":
            given["delay_compensation"] = "muon"
        if SCHEDULES[contender.kind].is_synchronous:
            given["clip_scope"] = "global"  # as the stock Trainer clips
        if records:
            given["timeline"] = str(job.folder / f"timeline-{contender.label}")
    elif contender.kind == "naive" and not options.on_cpu:
        model = _dispatch(model, job)
    clock = Clock()
    arguments = arguments_of(OuroborosArguments if contender.is_ours else TrainingArguments, given, contender.settings)
    stock_muon = options.optimizer == "muon" and not contender.is_ours
    trainer = (MeasuredOuroborosTrainer if contender.is_ours else MeasuredTrainer)(
        model=model,
        args=arguments,
        optimizer_cls_and_kwargs=muon(arguments, model, matrices) if stock_muon else None,
        train_dataset=train,
        eval_dataset=validation,
        callbacks=[Timekeeper(clock, job.target)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.clock = clock
    clock.restart()
    output = trainer.train()
    result = steady_state(job, clock) | {
        "training_loss": output.training_loss,
        "peak_memory_mib": peak_memory_mib(options.devices if world_size == 1 else None),
    }
    if not contender.is_ours:  # ours log late, several updates at once
        result["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not job.evaluate:
        result["eval_loss"] = trainer.evaluate()["eval_loss"]
    if records:
        interval = trainer.timeline.steady_interval(SETTLING_TICKS, multiple_of=contender.micro_batches)
        result["busy_shares"] = trainer.timeline.busy_shares(*interval)
    if contender.is_ours:
        result["stage_plan"] = str(trainer.stage_plan)
    return result


def arguments_of(kind: type[TrainingArguments], given: dict[str, Any], settings: tuple[tuple[str, str], ...]) -> Any:
    """The arguments, as from a command line on which a contender's settings come last and win.

    Raises:
        ContenderError: a setting has a value that the option does not take.
    """
    command = []
    for name, value in (*given.items(), *settings):
        command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            (arguments,) = HfArgumentParser(kind).parse_args_into_dataclasses(command)
    except SystemExit as error:
        raise ContenderError(complaint.getvalue().strip().splitlines()[-1]) from error
    return arguments


def _dispatch(model: torch.nn.Module, job: Job) -> torch.nn.Module:
    """The naive way on accelerators: parts on several devices, one of them computing at a time."""
    from accelerate import dispatch_model

    plan = split_model(model, job.options.devices, job.options.device_map, check=False).plan
    return dispatch_model(model, {name: torch.device(d).index for name, d in plan.device_map().items()})
