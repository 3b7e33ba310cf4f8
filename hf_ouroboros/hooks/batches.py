"""Batches among processes: who gets which, what counts how often."""

from __future__ import annotations

from typing import Any

import torch

from ..engine.device_queue import has_queues
from ..engine.streams import COLUMNS, SEGMENTS
from ..partition.meta import target_labels
from ..precision import without_scaler
from .agreement import AgreementHooks
from .touching import is_foreign

_COUNTS = ("num_parameters", "floating_point_ops", "estimate_tokens")


class BatchHooks(AgreementHooks):
    """Makes Trainer share batches within a replica, shard them among replicas, and count everything once."""

    current_flos: float  # type: ignore[assignment]  # Trainer begins with a whole number, and goes on with any
    _signature_columns: list[str] | None  # type: ignore[assignment]  # mypy has only seen that Trainer begins with None
    _counts_all_replicas: bool = False
    _counted_for: Any = None
    _operations_each: float = 0.0

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer; where devices are processes, data and metrics follow the replicas."""
        with without_scaler(self.args):
            super().create_accelerator_and_postprocess()
        self._agree("the creation of the trainer's accelerator")  # where all are, before a group is formed
        if not self._processes.alone:
            self.accelerator = self._processes.share_batches(self.accelerator)
            self.gather_function = self.accelerator.gather_for_metrics
        elif has_queues(self.args.device.type):
            self.accelerator.device_placement = False  # each stage fetches what it needs from the host's memory

    def _take_over_counting(self) -> None:
        """When the trainer was made: the target tokens of all replicas are counted here.

        Releases of Trainer differ in how they scale a loss for that; here the stage's loss does it.
        """
        self._counts_all_replicas = self._processes.replicas > 1 and self.args.average_tokens_across_devices
        if not self._processes.alone:
            self.args.average_tokens_across_devices = False

    def get_tp_size(self) -> int:
        """How many processes share a batch: Trainer divides its count of processes by this."""
        return self._processes.processes_per_replica

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Number of target tokens of an update over all replicas: labels after the shift that are not -100."""
        if self.is_in_train and not self._evaluates:
            self._processes.check_batches(batch_samples, f"update {self.state.global_step + 1}")
        if not batch_samples or batch_samples[0].get("labels") is None:
            return None
        targets = [
            target_labels(batch["labels"], self.model) if batch.get("shift_labels") is None else batch["shift_labels"]
            for batch in batch_samples
        ]
        first, *others = (target.ne(-100).sum() for target in targets)
        count = sum(others, first)
        alone, trains = self._processes.alone, not self._evaluates
        if alone and trains and count.device.type == "cpu" and has_queues(device.type):
            return count.pin_memory()  # where the last stage fetches it
        count = count.to(device)
        if self._counts_all_replicas and trains:  # a batch of an evaluation stands for itself
            return self.accelerator.gather(count).sum()
        return count

    def _set_signature_columns_if_needed(self) -> None:
        """As in Trainer; what is said about a batch's targets and its place in a stream is needed, too."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or ()), "shift_labels", COLUMNS, SEGMENTS]

    def store_flos(self) -> None:
        """As in Trainer; while it waits for another process it hears of that one's failure."""
        if self._processes.alone:
            super().store_flos()
        else:
            self.current_flos = self._processes.sum(self.current_flos)
            self.state.total_flos, self.current_flos = self.state.total_flos + self.current_flos, 0

    def floating_point_ops(  # type: ignore[override]  # a share need not be a whole number, nor is it one in Trainer's sum
        self, inputs: dict[str, torch.Tensor | Any]
    ) -> float:
        """This process's share of the operations of a batch; Trainer sums over processes.

        Trainer counts the model's parameters for each batch; as stages keep theirs, once in a run is enough.
        """
        model, name = self.model, getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs or any(is_foreign(model, method) for method in _COUNTS):
            return super().floating_point_ops(inputs) / self.get_tp_size()
        if self._counted_for is not self.engine:
            self._counted_for = self.engine
            self._operations_each = super().floating_point_ops({name: torch.empty(1)}) / self.get_tp_size()
        return inputs[name].numel() * self._operations_each
