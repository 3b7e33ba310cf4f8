"""Callbacks of a script: while one of its own touches the model the pipeline rests, and what it has changed counts.

A callback that touches nothing costs nothing. One whose code names model, optimizer or trainer, or holds parts of them, finds
the pipeline at rest; any other makes it rest as soon as it does something with a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler

from ..errors import UnsupportedOptionError
from ..main_thread import unwatched
from .interfaces import SplitTrainer
from .script import Script
from .structure import Structure
from .touching import Watching, is_foreign, names_model


class ScriptCallbacks(CallbackHandler):
    """Trainer's handler, in which a script's own callbacks may touch what the pipeline works on.

    Args:
        handler: Trainer's.
        trainer: whose callbacks they are.
    """

    def __init__(self, handler: CallbackHandler, trainer: CallbackHooks):
        self.__dict__.update(handler.__dict__)
        self._trainer = trainer

    def call_event(self, event: str, *args: Any, **kwargs: Any) -> TrainerControl:
        """As in Trainer."""
        trainer = self._trainer
        if not trainer._pipeline_runs or not any(is_foreign(callback, event) for callback in self.callbacks):
            return super().call_event(event, *args, **kwargs)
        arguments, state, control = args
        for callback in list(self.callbacks):
            one = object.__new__(CallbackHandler)
            one.__dict__.update(self.__dict__, callbacks=[callback])
            with trainer._touching(callback, event) if is_foreign(callback, event) else nullcontext():
                control = one.call_event(event, arguments, state, control, **kwargs)
        return control


class CallbackHooks(SplitTrainer):
    """Lets a script's callbacks look at the model, write, freeze and add to it between micro-batches."""

    _settings: Structure  # of the model, as the stages know them; only where a script sets some

    @property
    def _pipeline_runs(self) -> bool:
        return self.is_in_train and self.engine is not None and not self.engine.closed

    def _look_at_script(self) -> None:
        """When training begins: what of the script's code meets the pipeline at work."""
        self._script = Script.of(self)
        if self._script.sets:
            self._settings = Structure.of(self.model)

    def _take_settings(self) -> None:
        """Before a micro-batch: settings of modules that were changed outside of callbacks are the stages', too.

        Raises:
            UnsupportedOptionError: the loss may have changed them, while other stages are at other micro-batches.
        """
        if not self._script.sets:
            return
        engine = self._running_engine
        engine.rest()
        before, self._settings = self._settings, Structure.of(self.model)
        changed = self._settings.settings_since(before)
        if not changed:
            return
        if self._script.loss_sets:
            name, attribute, _ = changed[0]
            raise UnsupportedOptionError(
                f"{name}.{attribute} was changed while the stages are training, by the loss perhaps, which is computed when other "
                "stages are at other micro-batches; change it in a callback (on_step_begin)"
            )
        self._tell_stages(changed)
        engine.take_weights()

    def _tell_stages(self, changed: list[tuple[str, str, Any]]) -> None:
        partition = self._partition
        within = next(f"{name}." if name else "" for name, m in self.model.named_modules() if m is partition.model)
        for name, attribute, value in changed:
            for stage in partition.stages if name.startswith(within) else ():  # not what is wrapped around the model
                _tell(stage, name.removeprefix(within), attribute, value)

    @contextmanager
    def _touching(self, callback: TrainerCallback, event: str) -> Iterator[None]:
        """In here, a callback finds the pipeline at rest where it touches the model; afterwards the model is as it left it."""
        visit = _Visit(self, callback, event)
        # A loss of the script's own may read what the callback writes, so earlier losses come first; and a view of weights
        # may be another library's (NumPy's), which nobody notices.
        if (
            self._script.has_loss
            or self.compute_loss_func is not None
            or self._running_engine.has_views
            or names_model(callback, event)
        ):
            visit.begin()
        with Watching(visit.begin, visit.want_gradient):
            yield
        visit.end()


class _Visit:
    """One call of a callback."""

    def __init__(self, trainer: CallbackHooks, callback: TrainerCallback, event: str):
        self._trainer, self._event = trainer, event
        self._who = f"{type(callback).__name__}.{event}"
        self._begun = False
        self._before: Structure | None = None

    def begin(self) -> None:
        """The callback touches the model."""
        if self._begun:
            return
        self._begun = True
        self._trainer._take_settings()  # what was changed before is not the callback's
        engine = self._trainer._running_engine
        if self._event == "on_pre_optimizer_step" and self._trainer._processes.alone:
            with unwatched():
                engine.expose_gradients()
        engine.open_weights()
        self._before = Structure.of(self._trainer.model)  # workers at work put hooks on the model for a moment

    def want_gradient(self) -> None:
        """The callback looks at the gradient of something.

        Raises:
            UnsupportedOptionError: it would not be there.
        """
        if self._event == "on_substep_end":
            raise UnsupportedOptionError(
                f"{self._who} looks at gradients within an update, which the stages still hold; look at them in "
                "on_pre_optimizer_step"
            )
        if not self._trainer._processes.alone and self._event in ("on_pre_optimizer_step", "on_optimizer_step"):
            raise UnsupportedOptionError(
                f"{self._who} looks at gradients, of which each of the {self._trainer._processes.world_size} processes has only "
                "those of its own stages; start the script as one process (python script.py)"
            )

    def end(self) -> None:
        """The callback is done.

        Raises:
            UnsupportedOptionError: it has changed what can only be changed before training.
        """
        if self._before is None:
            return
        model, before = self._trainer.model, self._before
        now = Structure.of(model)
        if change := now.change_of_parts_since(before) or now.change_of_hooks_since(before):
            raise UnsupportedOptionError(
                f"{self._who} has changed {change} while the stages are training; change it before train(), which then "
                "takes the model as it is"
            )
        self._trainer._tell_stages(now.settings_since(before))
        self._trainer._settings = now
        self._trainer._running_engine.take_weights()


def _tell(stage: nn.Module, name: str, attribute: str, value: Any) -> None:
    """Sets an attribute in a stage's copy of a module, if it has one."""
    try:
        module = stage.get_submodule(name) if name else None
    except AttributeError:
        return
    if module is not None and attribute != "forward":
        setattr(module, attribute, value)
