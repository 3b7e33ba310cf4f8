"""What TRL's trainers share over stages: a loss with its metrics, computed by a worker, told when its tick comes back.

TRL computes a loss and its metrics in one place. Here that place is a worker, ticks before or after what the main thread is
doing, so it is given a copy of the trainer with metrics of its own; they are taken over when the tick's loss comes back.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from ..adapters import base_of
from ..engine.settings import FinishedLoss
from ..errors import UnsupportedOptionError
from ..hooks.card import CardHooks
from ..trainer import OuroborosTrainer
from .fused_head import FusedHead

Metrics = dict[str, list[float]]


class TickHooks(OuroborosTrainer):
    """Stands before one of TRL's trainers, `_trl`, and before `OuroborosTrainer` among the bases of a class."""

    _trl: ClassVar[Any]
    _metrics: dict[str, defaultdict[Any, list[Any]]]  # these five are TRL's
    _total_train_tokens: int
    _tag_names: list[str]
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _fields: Collection[str] = ("entropy", "is_top1")  # of the head's output, for metrics
    _ticks: deque[Metrics]  # of the last stage, in the order in which losses come back

    def _after_trl(self) -> None:
        """What is left to do when TRL's trainer has made itself.

        Raises:
            UnsupportedOptionError: a loss of experts.
        """
        base: nn.Module = base_of(self.model)
        vars(base).pop("forward", None)  # TRL's fused head, which stages have no use for
        if self.aux_loss_enabled:
            raise UnsupportedOptionError(
                f"router_aux_loss_coef={self.router_aux_loss_coef}: a loss of the experts of all layers is not computed by "
                "stages; set router_aux_loss_coef=0.0"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss, of the logits of the last stage."""
        training = model is not self._staged
        view: Any = copy.copy(self)
        view._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        view._total_train_tokens = 0 if training else self._total_train_tokens
        view.model = SimpleNamespace(training=training)
        view.accelerator = _Alone(inputs["input_ids"].device)
        with _without_warning() if return_outputs else nullcontext():
            head = FusedHead(model, self._fields)
            result = self._trl.compute_loss(view, head, dict(inputs), return_outputs, num_items_in_batch)
        if training:
            self._ticks.append(dict(view._metrics["train"]))
        else:
            _add(self._metrics["eval"], view._metrics["eval"])
        return result

    def get_tp_size(self) -> int:
        """As in OuroborosTrainer; one for the copy of this trainer that computes a loss."""
        return 1 if isinstance(self.accelerator, _Alone) else super().get_tp_size()

    def _start_engine(self) -> None:
        super()._start_engine()
        self._ticks.clear()

    def _collect(self) -> list[FinishedLoss]:
        """As in OuroborosTrainer; with the losses come their metrics."""
        finished = super()._collect()
        for _ in finished if self._ticks else ():
            metrics = self._ticks.popleft()
            self._total_train_tokens += int(metrics.pop("num_tokens")[0])
            _add(self._metrics["train"], metrics)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return finished

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with TRL's metrics of the micro-batches whose losses have come back, the same in all processes."""
        training = not any(key.startswith("eval_") for key in logs)
        mode = "train" if training else "eval"
        means = {key: [sum(values) / len(values)] for key, values in self._metrics[mode].items()}
        self._metrics[mode] = defaultdict(list, self._processes.from_last_stage(means))
        with self._in_mode(training):
            self._trl.log(self, logs, start_time)

    @contextmanager
    def _in_mode(self, training: bool) -> Iterator[None]:
        """TRL asks the model's flag whether it trains or evaluates, which says nothing while workers train."""
        before, self.model.training = self.model.training, training
        try:
            yield
        finally:
            self.model.training = before

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """This package's card, with TRL's tags."""
        if not args and kwargs.get("tags") is None:
            kwargs["tags"] = list(self._tag_names)
        CardHooks.create_model_card(self, *args, **kwargs)


def check_arguments(args: Any, kind: type, trainer: str) -> None:
    """Refuses arguments that have not the options of both sides.

    Raises:
        UnsupportedOptionError: they are of another class.
    """
    if not isinstance(args, kind):
        raise UnsupportedOptionError(
            f"args is a {type(args).__name__}, but {trainer} needs an {kind.__name__}, which has the options of both"
        )


@contextmanager
def _without_warning() -> Iterator[None]:
    """Keeps TRL from telling of a second forward for the logits, which there is not. Not for threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class _Alone:
    """The accelerator as a loss on one stage sees it: nothing to gather.

    Args:
        device: of the stage.
    """

    parallelism_config = None
    num_processes = 1

    def __init__(self, device: torch.device):
        self.device = device

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def gather_for_metrics(self, value: torch.Tensor) -> torch.Tensor:
        return value


def _add(total: dict[str, list[float]], part: Metrics) -> None:
    for key, values in part.items():
        if key == "num_tokens":  # a running total
            total[key] = values
        else:
            total[key] += values
