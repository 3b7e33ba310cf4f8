"""What of a script's own code meets the pipeline at work: looked at once, when training begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .interfaces import SplitTrainer
from .shared_state import check_sharing, shares_state
from .touching import is_foreign, sets_attributes, speaks_of

_READ_BY_A_LOSS = ("_prepare_inputs", "_prepare_input", "get_batch_samples")
_OF_NOW = frozenset(
    "optimizer lr_scheduler param_groups get_last_lr _last_lr _get_learning_rate log_history best_metric num_input_tokens_seen "
    "total_flos control".split()
)
_MODEL = frozenset({"model", "model_wrapped"})
_MAIN_THREAD = (
    *_READ_BY_A_LOSS,
    "training_step",
    "log",
    "evaluate",
    "prediction_step",
    "_maybe_log_save_evaluate",
    "save_model",
)


@dataclass(frozen=True)
class Script:
    """What was found of a script's code when training began.

    Args:
        has_loss: whether the loss is its own.
        has_training_step: whether `training_step` is; it gets the loss of each micro-batch.
        rests_each_time: whether each micro-batch is waited for, because its loss, or code in another stage, reads what is of now.
        logs_wait: whether logs wait for their losses, because code of its own may decide by what it is told.
        loss_sets: whether its loss may set attributes of modules.
        sets: whether its loss may, or its methods in the main thread.
    """

    has_loss: bool
    has_training_step: bool
    rests_each_time: bool
    logs_wait: bool
    loss_sets: bool
    sets: bool

    @classmethod
    def of(cls, trainer: SplitTrainer) -> Script:
        """Looks at the methods of a trainer, its loss, its callbacks, and the hooks in its stages.

        Raises:
            UnsupportedOptionError: stages share what they can't share.
        """

        def may_set(code: Any) -> bool:
            return speaks_of(code, trainer, _MODEL) and sets_attributes(code, trainer)

        losses = [trainer.compute_loss, trainer.compute_loss_func]
        has_loss = trainer.compute_loss_func is not None or is_foreign(trainer, "compute_loss")
        rests = has_loss and (
            any(is_foreign(trainer, name) for name in _READ_BY_A_LOSS)
            or any(speaks_of(loss, trainer, _OF_NOW) for loss in losses)
        )
        if trainer.stage_plan.num_stages > 1 and shares_state(trainer._partition.stages, trainer):
            check_sharing(trainer)
            rests = True
        hears = any(is_foreign(callback, "on_log") for callback in trainer.callback_handler.callbacks)
        loss_sets = any(map(may_set, losses))
        return cls(
            has_loss=has_loss,
            has_training_step=is_foreign(trainer, "training_step"),
            rests_each_time=rests,
            logs_wait=hears or is_foreign(trainer, "log") or rests,
            loss_sets=loss_sets,
            sets=loss_sets or any(may_set(getattr(trainer, name)) for name in _MAIN_THREAD),
        )
