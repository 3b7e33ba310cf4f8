"""Logs: each is of its own step, with the losses and the gradient norm of that step, however late these are known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.trainer_utils import TrainOutput

from ..engine.settings import FinishedLoss
from ..ledger import DueLog, LossLedger
from .interfaces import SplitTrainer


class Moment(NamedTuple):
    """What Trainer's state says when a log is due."""

    epoch: float
    tokens: int
    flos: float
    learning_rate: float
    start_time: float | None


class LogHooks(SplitTrainer):
    """Writes Trainer's logs as soon as their losses are known, in order, without making the pipeline wait for them.

    A log waits for its losses where nothing is late, before evaluations, checkpoints and the end of the run, and where the
    script has callbacks of its own (`on_log`) or a `log` of its own: these may decide by what they are told.
    """

    def _start_ledger(self) -> None:
        """When the engine was made."""
        self._ledger = LossLedger(self.state.global_step, self.args.logging_nan_inf_filter)
        self._nothing = torch.zeros(())
        self._skipped: list[
            int
        ] = []  # updates since the last log in which stages have dropped gradients that had overflowed

    def _take_reports(self) -> None:
        """Takes in what is known of losses and norms."""
        for loss in self._collect():
            self._ledger.add_loss(loss.tick, loss.loss)
        for norm in self._running_engine.collect_norms():
            self._ledger.add_norm(norm.update, norm)
            if norm.scale is not None and norm.has_overflowed:
                self._skipped.append(norm.update)

    def _collect(self) -> list[FinishedLoss]:
        """Losses that have come since the last call."""
        return self._running_engine.collect()

    def _log_is_due(self, update: int | None, learning_rate: float | None, start_time: float | None) -> None:
        """Remembers what Trainer would log now."""
        state = self.state
        self.store_flos()
        rate = self._get_learning_rate() if learning_rate is None else learning_rate
        moment = Moment(state.epoch, state.num_input_tokens_seen, state.total_flos, rate, start_time)
        steps = state.global_step - self._globalstep_last_logged
        self._ledger.due(DueLog(state.global_step, steps, update, self._running_engine.updates, moment))
        self._globalstep_last_logged = state.global_step
        self.control.should_log = False

    def _write_logs(self, wait: bool) -> None:
        """Writes the logs that are due.

        Args:
            wait: whether all of them are wanted now, whatever it takes; else those that nobody has to wait for.
        """
        engine = self._running_engine
        while (log := self._ledger.waiting) is not None:
            last = log.before - 1
            if wait or engine.updates - 1 >= last + engine.updates_behind(last):
                engine.account_for(log.before)
            elif not self._script.logs_wait:
                return
            self._take_reports()
            found = self._ledger.next_log()
            if found is None:  # there are micro-batches of an update that is still open
                engine.account_for_open()
                self._take_reports()
                found = self._ledger.next_log()
                assert found is not None  # all of its losses have come
            self._write(*found)

    def _write(self, log: DueLog, loss: float, norm: Any) -> None:
        moment: Moment = log.others
        logs = {"loss": loss}
        if norm is not None:
            logs["grad_norm"] = norm.value
        logs["learning_rate"] = moment.learning_rate
        if norm is not None and norm.scale is not None:
            logs["loss_scale"] = norm.scale
            logs["skipped_updates"] = sum(update < log.before for update in self._skipped)
            self._skipped = [update for update in self._skipped if update >= log.before]
        with self._at(log.step, moment):
            self.log(logs, moment.start_time)

    @contextmanager
    def _at(self, step: int, moment: Moment) -> Iterator[None]:
        """Lets the state say what it said then: loggers ask it for the step."""
        state = self.state
        now = state.global_step, state.epoch, state.num_input_tokens_seen, state.total_flos
        state.global_step, state.epoch, state.num_input_tokens_seen, state.total_flos = step, *moment[:3]
        try:
            yield
        finally:
            state.global_step, state.epoch, state.num_input_tokens_seen, state.total_flos = now

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """As in Trainer; its logs come before whatever else is to be done."""
        control = self.control
        if self._script.has_training_step:  # its losses are in tr_loss
            if control.should_log and grad_norm is not None:
                self._running_engine.account_for(grad_norm + 1)
                self._take_reports()
                grad_norm = self._ledger.norm(grad_norm)
            super()._maybe_log_save_evaluate(
                tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
            )
            return
        if control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._log_is_due(grad_norm, learning_rate, start_time)
        looks = control.should_evaluate or control.should_save or control.should_training_stop
        if looks:
            self._running_engine.synchronize()
        self._write_logs(wait=bool(looks) or self._script.logs_wait)
        super()._maybe_log_save_evaluate(
            tr_loss, None, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        engine = self._running_engine
        engine.finish()  # so that nothing stays on its way between devices
        if not self._script.has_training_step:
            self._write_logs(wait=True)
            engine.account_for(engine.updates)
            self._take_reports()
            self._total_loss_scalar, rest = self._ledger.finish()
            self._tr_loss = torch.tensor(rest, dtype=torch.float64)
        return super()._finalize_training(*args, **kwargs)
