"""OuroborosDPOTrainer: TRL's DPOTrainer, whose model is split into stages.

A batch's chosen and rejected rows go through the stages as one, so the last stage has all that the loss compares; the
reference's log-probabilities come with the data.
"""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from trl import DPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from ..errors import UnsupportedOptionError
from ..trainer import OuroborosTrainer
from .configuration import OuroborosDPOConfig
from .reference import ReferenceModel
from .ticks import TickHooks, check_arguments

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class OuroborosDPOTrainer(TickHooks, DPOTrainer, OuroborosTrainer):
    """`trl.DPOTrainer` that trains in stages with delayed gradients: same arguments, data sets, losses and metrics.

    The reference is the model as it is given; with `peft_config`, the model below the adapters. Its log-probabilities are
    computed by the stages, before training.

    Args:
        model: a model, a PeftModel, or a name; with `peft_config`, adapters are put on it.
        ref_model: None.
        args: an `OuroborosDPOConfig`.

    Raises:
        UnsupportedOptionError: options of TRL that have no meaning with stages.
    """

    _trl = DPOTrainer

    def __init__(
        self,
        model: Any,
        ref_model: None = None,
        args: OuroborosDPOConfig | None = None,
        *more: Any,
        **kwargs: Any,
    ):
        if args is None:
            args = OuroborosDPOConfig(output_dir="tmp_trainer")
        check_arguments(args, OuroborosDPOConfig, "OuroborosDPOTrainer")
        if ref_model is not None:
            raise UnsupportedOptionError(
                f"ref_model is a {type(ref_model).__name__}: a second model is not split into stages; leave it out, then the "
                "reference is the model before training"
            )
        self._ticks = deque()
        self._reference = ReferenceModel(self, without_adapters=kwargs.get("peft_config") is not None)
        reference: Any = self._reference  # stands in for a model
        super().__init__(model, reference, args, *more, **kwargs)
        self._fields = ("entropy", "is_top1", "mean_logits", *(["log_sum_sq_probs"] if self.use_weighting else []))
        self.ref_model = None  # what TRL asks whether it is to run one
        self._after_trl()

    def _split(self, model: nn.Module, args: Any) -> None:
        if cast(OuroborosDPOConfig, args).disable_dropout:  # before stages copy it
            disable_dropout_in_model(model)
        super()._split(model, args)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Dataset:
        """The data set with the reference's log-probabilities, which all processes compute together, or its own.

        Raises:
            UnsupportedOptionError: it has no length, or the model is no reference any more.
        """
        if not isinstance(dataset, Dataset):
            raise UnsupportedOptionError(
                f"the data set {name!r} is a {type(dataset).__name__}: the reference's log-probabilities are computed before "
                "training, of a data set with a length; give a datasets.Dataset"
            )
        if set(COLUMNS) <= set(dataset.column_names):
            return dataset
        if self.state.global_step > 0 and not self._reference.without_adapters:
            raise UnsupportedOptionError(
                f"the data set {name!r} was given after training has begun, and the model is no reference any more; give it as "
                "eval_dataset when the trainer is made"
            )
        vars(self._reference).pop("forward", None)  # what TRL and accelerate have put around it
        loader = DataLoader(dataset, batch_size, collate_fn=self.data_collator)
        found: list[list[torch.Tensor]] = [[], []]
        self.synchronize()
        reference: Any = self._reference
        self.ref_model = reference
        try:
            with self._processes.guard("computing the reference's log-probabilities"):
                for batch in loader:
                    for logps, values in zip(found, self.compute_ref_log_probs(self._reference, batch), strict=True):
                        logps.append(values.float().cpu())
        finally:
            self.ref_model = None
        for column, values in zip(COLUMNS, found, strict=True):
            dataset = dataset.add_column(column, np.asarray(torch.cat(values)))
        return dataset

    def _without_repetitions(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor | None]:
        pairs, left = len(inputs["input_ids"]) // 2, self._processes.rows_left
        own = pairs if left is None else max(0, min(pairs, left - self._processes.replica * pairs))
        if own == pairs:
            return inputs, None
        rows = torch.cat(
            [torch.arange(own), torch.arange(pairs, pairs + own)]
        )  # chosen ones come first, then rejected ones
        return {key: value[rows] if len(value) == 2 * pairs else value[:own] for key, value in inputs.items()}, rows

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple:
        """As in TRL; where devices are processes, those with the last stage have the loss."""
        if not self._partition.has_last_stage:
            with torch.no_grad():
                self._staged.pass_on(inputs)
            return None, None, None
        return DPOTrainer.prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs)
