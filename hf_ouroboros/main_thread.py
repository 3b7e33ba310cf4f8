"""The main thread while the pipeline works: whatever of a script's code touches the model there finds it at rest.

Callbacks are not the only code of a script that runs between two micro-batches: there are data sets and collators,
`_prepare_inputs` and `training_step`, `log`, `evaluate` and `compute_metrics`, schedules of the learning rate. What they read are
the newest weights, and what they write counts from the next micro-batch on, as in stock Trainer. Whoever does not touch the
model pays a look at the tensors that he uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from .engine.reads import WITHOUT_VALUES, name_of, storage_of, tensors_in
from .errors import UnsupportedOptionError

if TYPE_CHECKING:
    from .hooks.interfaces import SplitTrainer


class MainThread(TorchFunctionMode):
    """While it is on, the pipeline rests as soon as this thread touches the model.

    Args:
        trainer: whose model and engine.
    """

    def __init__(self, trainer: SplitTrainer):
        super().__init__()
        self._trainer = trainer
        self._process = os.getpid()
        self._model: nn.Module | None = None
        self._own: dict[int, torch.Tensor] = {}
        self._views: dict[int, nn.Parameter] = {}  # storage -> parameter, of which a script may have a view
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, writes = name_of(func)
        if (writes or name not in WITHOUT_VALUES) and not self.paused and self._trainer._pipeline_runs:
            self._look(name, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, name: str, args: Any, kwargs: Any) -> None:
        if self._model is not self._trainer.model:
            self._know(self._trainer.model)
        for tensor in tensors_in((args, kwargs)):
            touched = self._own.get(id(tensor))
            if touched is None:
                storage = storage_of(tensor)
                touched = None if storage is None else self._views.get(storage)
                if touched is not None and storage_of(touched) != storage:  # what was there is gone
                    touched = None
            if touched is not None:
                self._touched(touched, name)

    def _touched(self, tensor: torch.Tensor, name: str) -> None:
        if os.getpid() != self._process:  # in a worker of a data loader
            return
        engine = self._trainer._running_engine
        self.paused = True
        try:
            if name == "grad" and isinstance(tensor, nn.Parameter) and engine.holds_gradients:
                raise UnsupportedOptionError(
                    "a gradient is asked for within an update, but the stages still hold it; look at gradients in "
                    "on_pre_optimizer_step"
                )
            engine.open_weights()
        finally:
            self.paused = False
        if isinstance(tensor, nn.Parameter) and (storage := storage_of(tensor)) is not None:
            self._views[storage] = tensor

    def _know(self, model: nn.Module) -> None:
        self._model = model
        self._own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._views = {s: p for p in model.parameters() if (s := storage_of(p)) is not None}


@contextmanager
def unwatched() -> Iterator[None]:
    """Within this context this package itself works on the model, at full speed."""
    mode = _get_current_function_mode()
    if not isinstance(mode, MainThread):
        yield
        return
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()
