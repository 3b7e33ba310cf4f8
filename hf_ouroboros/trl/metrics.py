"""TRL's metrics over stages: each is of its own micro-batch, and is logged with the loss of that micro-batch, in all processes.

A worker computes a loss with its metrics, ticks before or after what the main thread is doing:

    worker, last stage   loss 0   loss 1   loss 2   loss 3        each leaves a `Tick` with its metrics
    main thread              ... submits 4, 5 ...     log of step 1   takes those of the ticks before step 1, as the loss
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..hooks.moments import LossAtItsStep, MomentContext
from ..ledger import DueLog
from ..partition import ModelCall
from ..trainer import OuroborosTrainer

Metrics = dict[str, list[Any]]
"""Values of metrics, one of each micro-batch; of `num_tokens` there is one, a sum."""

_of_this_thread = threading.local()


class Tick:
    """The metrics of one micro-batch.

    Args:
        trainer: that asked for its loss.
        step: updates made before its own.
    """

    def __init__(self, trainer: MetricsHooks, step: int):
        self.trainer, self.step = trainer, step
        self.metrics = {"train": defaultdict[str, list[Any]](list), "eval": defaultdict[str, list[Any]](list)}
        self.later: list[Callable[[], Metrics]] = []
        """What gives more of them in the main thread."""

    def take(self) -> Metrics:
        """All of them."""
        for more in self.later:
            add(self.metrics["train"], more())
        return self.metrics["train"]


class LossOfTick(LossAtItsStep):
    """The loss as the trainer computes it, with a place for the metrics that this leaves behind."""

    def __call__(self, model: ModelCall, inputs: dict[str, Any], context: MomentContext) -> torch.Tensor:
        """See `LossOfModel`."""
        trainer: Any = self._trainer
        tick = _of_this_thread.tick = Tick(trainer, context.moment[0])
        try:
            loss = super().__call__(model, inputs, context)
        finally:
            _of_this_thread.tick = None
        trainer._ticks.append(tick)
        return loss


class MetricsHooks(OuroborosTrainer):
    """Stands before one of TRL's trainers, `_trl`, among the bases of a class."""

    _trl: ClassVar[Any]
    _total_train_tokens: int
    _ticks: deque[Tick]  # of the last stage, in their order, whose metrics have not been taken
    _own_metrics: dict[str, defaultdict[str, list[Any]]]

    @property
    def _metrics(self) -> dict[str, defaultdict[str, list[Any]]]:
        """As in TRL, {"train": ..., "eval": ...}; while a worker computes the loss of a micro-batch, that micro-batch's."""
        tick = tick_of(self)
        return self._own_metrics if tick is None else tick.metrics

    @_metrics.setter
    def _metrics(self, metrics: dict[str, defaultdict[str, list[Any]]]) -> None:
        self._own_metrics = metrics

    def _make_loss(self) -> LossOfTick:
        return LossOfTick(self)

    def _start_engine(self) -> None:
        super()._start_engine()
        self._ticks.clear()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in OuroborosTrainer, which need not wait for the loss; TRL's own is about offloading, which is refused."""
        return OuroborosTrainer.training_step(self, *args, **kwargs)

    # ---- from ticks to logs ----

    def _take_metrics(self, before: float = math.inf) -> None:
        """Takes over the metrics of micro-batches of the first so many updates, whose losses have all been computed."""
        metrics = self._metrics["train"]
        while self._ticks and self._ticks[0].step < before:
            found = self._ticks.popleft().take()
            if "num_tokens" in found:
                self._total_train_tokens += int(found.pop("num_tokens")[0])
                metrics["num_tokens"] = [self._total_train_tokens]
            add(metrics, found)

    def _share_metrics(self, mode: str) -> None:
        """What the process with the last stage has, in all processes."""
        self._total_train_tokens, found = self._processes.from_last_stage(
            (self._total_train_tokens, dict(self._metrics[mode]))
        )
        self._metrics[mode] = defaultdict(list, found)

    def _write(self, log: DueLog, loss: float, norm: Any) -> None:
        self._take_metrics(log.step)
        self._share_metrics("train")
        super()._write(log, loss, norm)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As in OuroborosTrainer; where a script has a training step of its own, Trainer writes the log at once."""
        if self._script.has_training_step and self.control.should_log:
            self._take_metrics()
            self._share_metrics("train")
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._take_what_is_left()
        self._share_metrics("train")
        return super()._finalize_training(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in OuroborosTrainer; tells all processes the metrics."""
        if self._pipeline_runs:
            self._take_what_is_left()  # the number of tokens is logged with an evaluation, too
        output = super().evaluation_loop(*args, **kwargs)
        self._share_metrics("eval")
        return output

    def _take_what_is_left(self) -> None:
        self._running_engine.synchronize()
        if not self._script.has_training_step:
            self._write_logs(wait=True)  # which take their own
        self._take_metrics()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with TRL's metrics of the micro-batches that the log is about."""
        with self._in_mode(training=not any(key.startswith("eval_") for key in logs)):
            self._trl.log(self, logs, start_time)

    @contextmanager
    def _in_mode(self, training: bool) -> Iterator[None]:
        """TRL asks the model's flag whether it trains or evaluates, which says nothing while workers train."""
        before, self.model.training = self.model.training, training
        try:
            yield
        finally:
            self.model.training = before


def tick_of(trainer: Any) -> Tick | None:
    """The micro-batch of this trainer whose loss this thread computes."""
    tick: Tick | None = getattr(_of_this_thread, "tick", None)
    return None if tick is None or tick.trainer is not trainer else tick


def add(total: Metrics, part: Metrics) -> None:
    """Adds metrics to others."""
    for key, values in part.items():
        if key == "num_tokens":  # a sum already
            total[key] = values
        else:
            total[key] = [*total.get(key, ()), *values]
