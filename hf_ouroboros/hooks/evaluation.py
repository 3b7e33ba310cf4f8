"""Evaluation: at a synchronized pipeline, over target tokens, and without any process holding the model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..partition.late_logits import only_loss_wanted
from ..partition.meta import target_labels
from ..processes import ProcessGrid
from ..processes.relay import AheadLoader
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
        with self._guarded("evaluating"):
            return self._evaluation_loop(dataloader, *args, **kwargs)

    def _evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self.synchronize()
        self._wrap_model(self.model, training=False)  # splits a model that was exchanged
        self._partition.carry_hooks()
        self._agree_on_evaluation(dataloader, args, kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if (relay := self._staged.relay) is not None and self._same_batches is not None:  # devices are processes
            dataloader = self._same_batches.of(dataloader, "evaluation")
            dataloader = AheadLoader(dataloader, relay, self.accelerator, self._staged.forward_scope)
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
        return output if self._grid is None else self._tell_all(self._grid, output)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple:
        """As in Trainer; remembers how many tokens the batch's loss stands for."""
        if (relay := self._staged.relay) is not None:
            if not relay.has_logits:
                with torch.no_grad(), self._staged.forward_scope():
                    relay.run(inputs)
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
        if stock and self._eval_sums is not None and count is not None and result[0] is not None:
            if torch.isfinite(result[0]) or not self.args.logging_nan_inf_filter:
                self._eval_sums.append((result[0].item(), count))
        return result

    def _get_target_count(self, inputs: dict[str, Any]) -> int | None:
        if inputs.get("shift_labels") is not None:
            return int(inputs["shift_labels"].ne(-100).sum())
        labels = inputs.get("labels")
        return None if labels is None else int(target_labels(labels, self.model).ne(-100).sum())

    def _token_weighted(self, sums: list[tuple[float, float]]) -> float | None:
        """Mean loss over the target tokens of all replicas; None where this process has no losses."""
        totals = torch.tensor([sum(loss * n for loss, n in sums if n), sum(n for _, n in sums)], dtype=torch.float64)
        grid, relay = self._grid, self._staged.relay
        if grid is not None and grid.replicas > 1 and relay is not None and relay.has_logits:
            totals = self.accelerator.gather(totals[None].to(self.args.device)).sum(0).cpu()
        return (totals[0] / totals[1]).item() if totals[1] else None

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Rows that only fill up the last batch of a replica don't count in the loss."""
        rows_left = self.accelerator.rows_left
        if self._grid is None or rows_left is None or inputs.get("labels") is None:
            return inputs
        rows = len(inputs["labels"])
        own = max(0, min(rows, rows_left - self._grid.replica * rows))
        if own == rows:
            return inputs
        keys = [key for key in ("labels", "shift_labels") if inputs.get(key) is not None]
        return {**inputs, **{key: torch.cat([inputs[key][:own], inputs[key][own:] * 0 - 100]) for key in keys}}

    def _tell_all(self, grid: ProcessGrid, output: EvalLoopOutput) -> EvalLoopOutput:
        """The metrics go to all processes, predictions to the main one."""
        source = grid.rank_of(self.stage_plan.placement[-1], 0)
        message = [(output.metrics, output.num_samples)]
        dist.broadcast_object_list(message, source)
        metrics, num_samples = message[0]
        predictions, labels = output.predictions, output.label_ids
        if source != 0 and grid.rank in (0, source):
            arrays = [(predictions, labels)]
            if grid.rank == source:
                dist.send_object_list(arrays, 0)
            else:
                dist.recv_object_list(arrays, source)
                predictions, labels = arrays[0]
        return EvalLoopOutput(predictions, labels, metrics, num_samples)
