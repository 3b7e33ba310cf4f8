"""OuroborosSFTTrainer: TRL's SFTTrainer, whose model is split into stages."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import nn
from trl import SFTTrainer

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

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple:
        """As in OuroborosTrainer; the loss is TRL's, a mean over target tokens, too."""
        if self._partition.has_last_stage:
            inputs = self._without_repeated_rows(inputs)
        count = self._get_target_count(inputs)
        result = OuroborosTrainer.prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs)
        if self._eval_sums is not None and count is not None and result[0] is not None:
            self._eval_sums.append((result[0].item(), count))
        return result
