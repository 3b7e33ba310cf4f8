"""Evaluation: at a synchronized pipeline, over target tokens, and without any process holding the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..partition.late_logits import only_loss_wanted
from ..partition.meta import target_labels
from .agreement import AgreementHooks
from .loss import has_late_logits, head_computes_loss


class EvaluationHooks(AgreementHooks):
    """Trainer's evaluation and prediction over stages.

    Where devices are processes, those with the last stage have the logits: they compute losses and metrics, which all
    processes then get, so that best model, early stopping and callbacks agree everywhere.
    """

    _eval_sums: list[tuple[float, float]] | None = None

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in Trainer; the loss is the mean over target tokens, not over batches."""
        with self._processes.guard("evaluating"):
            return self._evaluation_loop(dataloader, *args, **kwargs)

    def _evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self.synchronize()
        self._wrap_model(self.model, training=False)  # splits a model that was exchanged
        self._partition.carry_hooks()
        self._agree_on_evaluation(dataloader, args, kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        dataloader = self._processes.evaluation_batches(dataloader, self._staged.forward_scope)
        self._eval_sums = []
        try:
            with self._staged.reading(**self.options.evaluation_options):
                output = super().evaluation_loop(dataloader, *args, **kwargs)
            sums = self._eval_sums
        finally:
            self._eval_sums = None
        loss = self._token_weighted(sums)
        if loss is not None and output.metrics is not None and f"{prefix}_loss" in output.metrics:
            output.metrics[f"{prefix}_loss"] = loss
        return self._tell_all(output)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple:
        """As in Trainer; remembers how many tokens the batch's loss stands for."""
        if not self._partition.has_last_stage:
            with torch.no_grad():
                self._staged.pass_on(inputs)
            return None, None, None
        inputs = self._without_repeated_rows(inputs)
        count = self._get_target_count(inputs)
        self._staged.loss_only = prediction_loss_only and head_computes_loss(self)
        try:
            with only_loss_wanted(self._staged.loss_only and has_late_logits(self)):
                result = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._staged.loss_only = False
        # A custom loss need not be a mean over tokens; then Trainer's mean over rows stays.
        stock = self.compute_loss_func is None and type(self).compute_loss is Trainer.compute_loss
        if stock and result[0] is not None:
            if torch.isfinite(result[0]) or not self.args.logging_nan_inf_filter:
                self._count_in(result[0], count)
        return result

    @property
    def _evaluates(self) -> bool:
        """Whether an evaluation runs."""
        return self._eval_sums is not None

    def _count_in(self, loss: torch.Tensor, count: int | None) -> None:
        """Takes a batch's loss into that of the evaluation, if one runs.

        Args:
            loss: mean over the batch's target tokens.
            count: how many there are; None if nobody knows.
        """
        if self._eval_sums is not None and count is not None:
            self._eval_sums.append((loss.item(), count))

    def _get_target_count(self, inputs: dict[str, Any]) -> int | None:
        if inputs.get("shift_labels") is not None:
            return int(inputs["shift_labels"].ne(-100).sum())
        labels = inputs.get("labels")
        return None if labels is None else int(target_labels(labels, self.model).ne(-100).sum())

    def _token_weighted(self, sums: list[tuple[float, float]]) -> float | None:
        """Mean loss over the target tokens of all replicas; None where this process has no losses."""
        totals = torch.tensor([sum(loss * n for loss, n in sums if n), sum(n for _, n in sums)], dtype=torch.float64)
        if self._processes.replicas > 1 and self._partition.has_last_stage:
            totals = self.accelerator.gather(totals[None].to(self.args.device)).sum(0).cpu()
        return (totals[0] / totals[1]).item() if totals[1] else None

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Rows that only fill up the last batch of a replica don't count in the loss."""
        rows_left = self._processes.rows_left
        if rows_left is None or inputs.get("labels") is None:
            return inputs
        rows = len(inputs["labels"])
        own = max(0, min(rows, rows_left - self._processes.replica * rows))
        if own == rows:
            return inputs
        keys = [key for key in ("labels", "shift_labels") if inputs.get(key) is not None]
        return {**inputs, **{key: torch.cat([inputs[key][:own], inputs[key][own:] * 0 - 100]) for key in keys}}

    def _tell_all(self, output: EvalLoopOutput) -> EvalLoopOutput:
        """The metrics go to all processes, predictions to the main one."""
        metrics, num_samples = self._processes.from_last_stage((output.metrics, output.num_samples))
        predictions, labels = self._processes.last_stage_to_main((output.predictions, output.label_ids))
        return EvalLoopOutput(predictions, labels, metrics, num_samples)
