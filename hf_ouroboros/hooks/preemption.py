"""Pre-emption: on SIGTERM a checkpoint is saved at the end of the update, by all processes at the same step."""

from __future__ import annotations

import signal
import threading
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .interfaces import SplitTrainer


class SaveOnSigterm(TrainerCallback):
    """What `enable_jit_checkpoint` means here: save after the update, then stop.

    The signal may reach the processes at different steps, or only some of them: all stop at the step at which the
    request has reached everybody with the reports of an update.

    Args:
        trainer: whose engine carries the request.
    """

    def __init__(self, trainer: SplitTrainer):
        self._trainer = trainer
        self._received = False
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listens from now on; Python takes signals in the main thread only."""
        self._received = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks for the checkpoint and the end of training, once all processes know."""
        engine = self._trainer._running_engine
        if self._received:
            engine.request_stop()
        if engine.stop_requested:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the previous handler back."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
