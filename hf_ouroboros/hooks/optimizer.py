"""The optimizer: Trainer's own, or that of a delay compensation, behind a face that tells the engine about updates."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers.utils import logging

from ..adapters import is_adapted
from ..engine.optimizers import check_optimizer
from ..engine.steps_at_once import has_hooks, why_at_once
from ..errors import UnsupportedOptionError
from ..main_thread import unwatched
from ..optim import Choice, choose
from ..optim.advice import automatic, warning, with_muon
from ..optim.matrices import hidden_matrices
from ..optim.nesterov import Nesterov
from ..schedules import SCHEDULES
from ..staged import StagedOptimizer, TellingOptimizer
from .interfaces import SplitTrainer
from .touching import is_foreign

logger = logging.get_logger(__name__)


class OptimizerHooks(SplitTrainer):
    """Makes the optimizer whose stages step on their own, and says what is done about delays."""

    _own_optimizer: bool = False
    _shows_gradients: bool = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The complete optimizer, as Trainer makes it, or that of the delay compensation."""
        if self._staged_optimizer is not None:
            return self._made_optimizer
        choice, given = self.delay_compensation, self.optimizer_cls_and_kwargs
        if (own := choice.optimizer) is not None:
            decayed = self.get_decay_parameter_names(self._partition.model)
            matrices = hidden_matrices(self._partition.stages, decayed, own.adapters)
            if is_adapted(self.model) and not own.adapters and not any(p.requires_grad for p in matrices):
                assert not isinstance(own, Nesterov)  # which takes everything
                raise UnsupportedOptionError(
                    f"delay_compensation={str(choice)!r} has no matrix to train here: those of adapters are left to AdamW; "
                    f"give delay_compensation_args='{own.adapters_option}=true', or choose another compensation"
                )
            self.optimizer_cls_and_kwargs = own.optimizer(self.args, matrices)
        super().create_optimizer()
        self.optimizer_cls_and_kwargs = given
        return self._made_optimizer

    def _face_optimizer(self) -> None:
        """Puts our face before the optimizer, whoever has made it: it tells the engine about updates."""
        if self._staged_optimizer is None:
            optimizer = self._made_optimizer
            check_optimizer(optimizer, self.model.parameters())
            self.delay_compensation.check(optimizer)
            self.optimizer = StagedOptimizer(optimizer, str(self.delay_compensation))

    def _look_at_optimizer(self) -> None:
        """When training begins: whether somebody wants all gradients of an update at once.

        That is a callback that looks at them, or an optimizer that does not step each parameter by itself, as the stages do.

        Raises:
            UnsupportedOptionError: the optimizer does, and can't be given them.
        """
        callbacks = self.callback_handler.callbacks
        # Each process has the gradients of its own stages only.
        self._shows_gradients = self._processes.alone and any(is_foreign(c, "on_optimizer_step") for c in callbacks)
        trusted = not self._own_optimizer and not is_foreign(self, "create_optimizer")
        reason = why_at_once(self._face.optimizer, self.lr_scheduler, trusted)
        if reason is None:
            return
        if not self._processes.alone:
            raise UnsupportedOptionError(
                f"{reason}, so it needs all gradients at once, but each of the {self._processes.world_size} processes has those "
                "of its own stages; start the script as one process (python script.py), or use another optimizer"
            )
        if self.delay_compensation.compensations:
            raise UnsupportedOptionError(
                f"{reason}, so it needs all gradients at once, but delay_compensation={self.options.delay_compensation!r} "
                "steps stage by stage; use delay_compensation='none', or another optimizer"
            )
        self._shows_gradients = True

    @property
    def delay_compensation(self) -> Choice:
        """What the run does about its delays, "auto" and "muon+auto" being resolved by K, M and optimizer."""
        if self.options.delay_compensation == "muon+auto":
            return choose(*with_muon(*self._delays))
        if self.options.delay_compensation != "auto":
            return choose(self.options.delay_compensation, self.options.delay_compensation_args)
        default = self.options.has_default_optimizer and not self._own_optimizer
        return choose(*automatic(*self._delays, "adamw" if default else "another", adapters=is_adapted(self.model)))

    @property
    def _delays(self) -> tuple[int, int]:
        """K, or 1 where nothing is late; and M."""
        stages = 1 if SCHEDULES[self.options.schedule].is_synchronous else self.stage_plan.num_stages
        return stages, self.args.gradient_accumulation_steps

    def _look_at_given_optimizer(self) -> None:
        """When the trainer was made: whether it was given an optimizer, which has to fit the delay compensation."""
        self._own_optimizer = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        choice = self.delay_compensation
        choice.check_weights(self.options.weights, self.options.delay_compensation)
        if self._own_optimizer and choice.optimizer is not None:
            raise UnsupportedOptionError(
                f"delay_compensation={self.options.delay_compensation!r} brings its own optimizer, but this trainer was given "
                "another one; leave out optimizers= and optimizer_cls_and_kwargs=, or choose another compensation"
            )
        if self.optimizer is not None:
            choice.check(self.optimizer)

    def _warn_of_delay(self, optimizer: torch.optim.Optimizer) -> None:
        choice = self.delay_compensation
        if not self.is_world_process_zero():
            return
        if self.options.delay_compensation == "auto" and choice.optimizer is not None:
            logger.warning(
                f"delay_compensation='auto' is {choice} here, where gradients are applied an update or more late: the matrices "
                "inside the layers are trained by Muon with steps as long as AdamW's, the rest by AdamW. "
                "delay_compensation='weight_prediction' keeps AdamW for all of them"
            )
        if self.options.weights == "now":
            return  # nothing was measured with it
        name = "adamw" if type(optimizer) is torch.optim.AdamW else type(optimizer).__name__
        others = "+".join(c.name for c in choice.compensations) or "none"
        text = warning(
            *self._delays,
            self.args.learning_rate,
            choice.optimizer.name if choice.optimizer else name,
            others,
            adapters=is_adapted(self.model),
        )
        if text is not None:
            logger.warning(text)

    @property
    def _staged_optimizer(self) -> StagedOptimizer | None:
        """Our face of the optimizer, which accelerate wraps once more; None before it was made."""
        optimizer = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        return optimizer if isinstance(optimizer, StagedOptimizer) else None

    @property
    def _face(self) -> StagedOptimizer:
        """Our face of the optimizer, once `_face_optimizer` has put it there."""
        face = self._staged_optimizer
        assert face is not None
        return face

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Nothing: the workers clip."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> int:
        """The number of the update that closes now: its norm is known later.

        Raises:
            UnsupportedOptionError: the bound of the norm is another than when the workers began.
        """
        engine = self._running_engine
        began, now = engine.settings.max_grad_norm, self.args.max_grad_norm or None
        if began != now:
            raise UnsupportedOptionError(
                f"max_grad_norm={now} was set while training, which began with {began}; set it before train()"
            )
        if engine.settings.scales_losses and type(self.optimizer) is AcceleratedOptimizer:
            self.optimizer.__class__ = TellingOptimizer
        if not self._shows_gradients and has_hooks(self._face.optimizer):
            self._look_at_optimizer()  # a callback has put them there
        if self._shows_gradients:
            with unwatched():
                engine.expose_gradients()
        return engine.updates
