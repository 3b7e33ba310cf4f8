"""OuroborosSFTTrainer: TRL's SFTTrainer, whose model is split into stages."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from ..errors import UnsupportedOptionError
from ..trainer import OuroborosTrainer
from .configuration import OuroborosSFTConfig
from .ticks import TickHooks, check_arguments


class OuroborosSFTTrainer(TickHooks, SFTTrainer, OuroborosTrainer):
    """`trl.SFTTrainer` that trains in stages with delayed gradients: same arguments, data sets, losses and metrics.

    Args:
        model: a model, a PeftModel, or a name; with `peft_config`, adapters are put on it.
        args: an `OuroborosSFTConfig`.

    Raises:
        UnsupportedOptionError: options of TRL that have no meaning with stages.
    """

    _trl = SFTTrainer

    def __init__(self, model: Any, args: OuroborosSFTConfig | None = None, *more: Any, **kwargs: Any):
        if args is None:
            args = OuroborosSFTConfig(output_dir="tmp_trainer")
        check_arguments(args, OuroborosSFTConfig, "OuroborosSFTTrainer")
        self._ticks = deque()
        super().__init__(model, args, *more, **kwargs)
        self._after_trl()
        given = self.eval_dataset
        for dataset in given.values() if isinstance(given, dict) else () if given is None else (given,):
            self._check_flattened_rows(dataset)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in OuroborosTrainer."""
        self._check_flattened_rows(dataloader.dataset)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _check_flattened_rows(self, dataset: Any) -> None:
        """Refuses an evaluation whose last batch repeats rows, for some replica, which can't be told from others there.

        Raises:
            UnsupportedOptionError: it does, or nobody knows.
        """
        replicas, rows = self._processes.replicas, self.args.per_device_eval_batch_size
        count = len(dataset) if hasattr(dataset, "__len__") else None
        if not self.padding_free or replicas == 1 or (count is not None and count % (replicas * rows) == 0):
            return
        raise UnsupportedOptionError(
            f"an evaluation of {'an unknown number of' if count is None else count} rows by {replicas} replicas, "
            f"per_device_eval_batch_size={rows} each, repeats some in its last batch, and padding_free (which packing='bfd' is, "
            "too) makes one row of all of them, in which they would count; choose a batch size so that "
            f"{replicas} x per_device_eval_batch_size divides the rows, or leave padding_free off"
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple:
        """As in TRL, without logits that nobody asks for; remembers how many tokens the batch's loss stands for."""
        if not self._partition.has_last_stage:
            with torch.no_grad():
                self._staged.pass_on(inputs)
            return None, None, None
        inputs = self._without_repeated_rows(inputs)
        count = self._get_target_count(inputs)
        result: tuple = SFTTrainer.prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs)
        self._count_in(result[0], count)
        return result
