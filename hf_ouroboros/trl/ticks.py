"""What TRL's trainers share over stages: a loss with its metrics, computed by a worker.

TRL computes a loss and its metrics in one place, of what a trainer is. Here that place is a worker, so it is given a copy of the
trainer with metrics of its own (`metrics.py`), and with nobody to gather them from (`gathering.py`).
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..adapters import base_of
from ..errors import UnsupportedOptionError
from ..hooks.card import CardHooks
from ..hooks.loss import has_late_logits
from .fused_head import FusedHead
from .gathering import Alone, OfReplicas
from .metrics import Metrics, MetricsHooks, add, tick_of


class TickHooks(MetricsHooks):
    """Stands before one of TRL's trainers, `_trl`, and before `OuroborosTrainer` among the bases of a class."""

    _tag_names: list[str]  # these three are TRL's
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _fields: Collection[str] = ("entropy", "is_top1")  # of the head's output, for metrics

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
        tick = tick_of(self)
        whole, (inputs, rows) = inputs, (inputs, None) if training else self._without_repetitions(inputs)
        scope = nullcontext if training else self._staged.forward_scope
        head = FusedHead(model, self._fields, has_late_logits(self), scope, whole, rows)
        view = self._seen_by_a_loss(training, Alone(inputs["input_ids"].device))
        if not training and self._processes.replicas > 1:
            view.accelerator = OfReplicas(view.accelerator.device, self.accelerator)
        with _without_warning() if return_outputs else nullcontext():
            result = self._trl.compute_loss(view, head, dict(inputs), return_outputs, num_items_in_batch)
        if tick is None:
            mode = "train" if training else "eval"
            add(self._metrics[mode], view._metrics[mode])
        elif self._processes.replicas == 1:
            add(tick.metrics["train"], view._metrics["train"])
        else:  # the main thread puts them together: a worker would wait for those of the other replicas
            assert head.measured is not None  # TRL's losses are made of what its fused head puts out
            tick.later.append(partial(self._metrics_of_replicas, _on_host(head.measured), _on_host(inputs)))
        return result

    def _without_repetitions(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor | None]:
        """What TRL's loss is computed of in an evaluation, and which rows of the batch that is; None for all of them."""
        return inputs, None

    def _seen_by_a_loss(self, training: bool, accelerator: Alone) -> Any:
        """A copy of this trainer, with metrics of its own, for TRL to compute a loss."""
        view: Any = copy.copy(self)
        view._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        view._total_train_tokens = 0 if training else self._total_train_tokens
        view.model = SimpleNamespace(training=training)
        view.accelerator = accelerator
        return view

    def _metrics_of_replicas(self, measured: Any, inputs: dict[str, Any]) -> Metrics:
        """TRL's metrics of one micro-batch of every replica; called by all processes with the last stage, in the same order.

        Args:
            measured: what the head has made of this replica's micro-batch.
            inputs: that micro-batch.
        """
        view = self._seen_by_a_loss(True, OfReplicas(inputs["input_ids"].device, self.accelerator))
        view.compute_loss_func = view.label_smoother = None  # the metrics are not of the loss
        with torch.no_grad():
            self._trl.compute_loss(view, lambda **_: measured, inputs)
        metrics: Metrics = view._metrics["train"]
        return metrics

    def get_tp_size(self) -> int:
        """As in OuroborosTrainer; one for the copy of this trainer that computes a loss."""
        return 1 if isinstance(self.accelerator, Alone) else super().get_tp_size()

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


def _on_host(values: Mapping[str, Any]) -> Any:
    """The same, whose tensors are on the CPU, without a graph."""
    found = {key: value.detach().cpu() if torch.is_tensor(value) else value for key, value in values.items()}
    return type(values)(**found) if isinstance(values, ModelOutput) else found


@contextmanager
def _without_warning() -> Iterator[None]:
    """Keeps TRL from telling of a second forward for the logits, which there is not. Not for threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
