"""The faces that Trainer sees: the staged model as an ordinary model, the staged optimizer as an ordinary one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers.utils import ModelOutput

from .engine.streams import Reading
from .errors import CheckpointError, EngineError, UnsupportedOptionError
from .head_model import call_model, causal_name
from .main_thread import unwatched
from .partition import Finish, ModelCall, Partition, compose, to_device
from .partition.module_hooks import OURS

if TYPE_CHECKING:
    from .hooks.interfaces import RunningEngine
    from .processes.relay import Relay


class StagedModel(nn.Module):
    """All stages as one model: forward for evaluation, parameters for counting, nothing to zero.

    Args:
        partition: the split model.
        autocast_dtype: dtype of mixed precision; None for none.
        relay: passes batches through the stages of other processes; None where all stages are here.
        outer: what is wrapped around the model; None for nothing.

    Attributes:
        loss_only: whether nobody looks at the logits, so that a head that computes the loss need not build them.
    """

    def __init__(
        self,
        partition: Partition,
        autocast_dtype: torch.dtype | None,
        relay: Relay | None = None,
        outer: nn.Module | None = None,
    ):
        super().__init__()
        self.relay = relay
        self.loss_only = False
        self.engine: RunningEngine | None = None
        self._reading: Reading | None = None
        self.stages = nn.ModuleList(partition.stages)
        self.config = partition.model.config
        self._outer = (partition.model if outer is None else outer,)
        self._partition = (partition,)  # in a tuple: the complete model must not be registered as a submodule
        self._autocast_dtype = autocast_dtype

    def _get_name(self) -> str:
        return causal_name(self._partition[0].model)

    def __getattr__(self, name: str) -> Any:
        """What the complete model has besides: `generate`, `device`, `get_input_embeddings`, ...

        Raises:
            EngineError: `generate`, where the model is on several devices.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__["_partition"][0].model
            found = getattr(model, name)
        if name == "generate" and len({p.device for p in model.parameters()}) > 1:
            raise EngineError(
                "generate() runs the complete model, whose stages are on several devices; save it and load it for that, or "
                "generate after train()"
            )
        return found

    def train(self, mode: bool = True) -> StagedModel:
        """Switches the stages and the complete model."""
        self._outer[0].train(mode)
        return super().train(mode)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Removes gradients that were shown to a script; all others live in the workers, which may be writing them."""
        if self.engine is not None:
            with unwatched():
                self.engine.clear_gradients()

    def forward(self, **inputs: Any) -> ModelOutput:
        """Runs all stages in turn; the pipeline has to be synchronized.

        Raises:
            UnsupportedOptionError: a training step calls the model by itself.
        """
        if self.training and torch.is_grad_enabled():
            raise UnsupportedOptionError(
                "a training step of its own calls the model and its backward by itself, which the stages do at "
                "moments of their own; put the loss into compute_loss, and let training_step call super().training_step"
            )
        inputs = to_device(inputs, self._partition[0].device_of_loss)
        without_labels = not self.loss_only and self._partition[0].stages[0].family.computes_loss

        def finish(call: ModelCall) -> ModelOutput:
            return call_model(call, inputs, without_labels)

        with unwatched(), self.forward_scope():
            output = self._run(inputs, finish) if self.relay is None else self.relay.run(inputs, finish)
        if self._autocast_dtype is not None and output.get("logits") is not None:
            output["logits"] = output["logits"].float()  # as accelerate does for an unsplit model
        return output

    def pass_on(self, inputs: dict[str, Any]) -> None:
        """Does this process's part of `forward`, where the last stage is another one's."""
        assert self.relay is not None  # else all stages are here
        with self.forward_scope():
            self.relay.run(inputs)

    def _run(self, inputs: dict[str, Any], finish: Finish) -> ModelOutput:
        if self._reading is None:
            return compose(self._partition[0].stages, inputs, finish=finish)
        segment = self._reading.streams.enter(inputs)
        memories = [memory.recall(segment) for memory in self._reading.memories]
        output = compose(self._partition[0].stages, inputs, memories, finish)
        for kept, memory in zip(self._reading.memories, memories, strict=True):
            kept.keep(segment, memory)
        return output

    @contextmanager
    def reading(self, **options: int) -> Iterator[None]:
        """Stages remember, within this context, what they read in it, and nothing else.

        Args:
            options: what evaluation changes in the configuration: `mem_len`, `clamp_len`.
        """
        partition = self._partition[0]
        config = partition.evaluation_config(**options)
        remembers = partition.stages[0].family.remembers(config)
        before = [(stage, stage.config) for stage in partition.stages]
        self._reading = Reading(len(before)) if remembers else None
        if self.relay is not None:
            self.relay.reading = self._reading
        for stage, _ in before:
            stage.config = config
        try:
            yield
        finally:
            for stage, training_config in before:
                stage.config = training_config
            self._reading = None
            if self.relay is not None:
                self.relay.reading = None

    @contextmanager
    def forward_scope(self) -> Iterator[None]:
        """Mixed precision, as in training."""
        kind = next(p for stage in self.stages for p in stage.parameters() if not p.is_meta).device.type
        with torch.autocast(kind, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None):
            yield


class TellingOptimizer(AcceleratedOptimizer):
    """Accelerate's face of a `StagedOptimizer`, which says whether the newest update has made a step, and not accelerate's scaler."""

    @property
    def step_was_skipped(self) -> bool:
        """Asked by Trainer and by accelerate's schedulers: those of learning rates don't count an update without a step.

        They do, as in stock, where the optimizer is one that torch's GradScaler lets find out by itself (a fused one).
        """
        return self.optimizer.step_was_skipped and not getattr(self.optimizer, "_step_supports_amp_scaling", False)


def refuse_forward(model: nn.Module) -> None:
    """Makes calls of a model whose other parts are in other processes (generate, for example) a named error."""

    def refuse(module: nn.Module, *inputs: Any) -> None:
        raise EngineError(
            f"this process holds only its own stages of the {type(model).__name__}, which can't run by itself (forward, "
            "generate). Use trainer.evaluate() or trainer.predict(); or trainer.save_model() in all processes and load "
            "the result with from_pretrained"
        )

    vars(refuse)[OURS] = True  # not a script's hook
    if not any(hasattr(hook, OURS) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(refuse)


class StagedOptimizer(torch.optim.Optimizer):
    """An optimizer whose `step` tells the engine that the update is complete; the stages step on their own.

    Parameter groups, state and `state_dict` are those of the complete optimizer that it wraps.

    Args:
        optimizer: the complete optimizer.
        compensation: the run's delay compensation, noted in the groups so that a resumed run can tell.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, compensation: str = "none"):
        self.optimizer = optimizer
        self.engine: RunningEngine | None = None
        self._compensation = compensation
        self._shape = _shape_of(optimizer)
        if compensation != "none":
            for group in optimizer.param_groups:
                group["delay_compensation"] = compensation

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def compensation(self) -> str:
        """The run's delay compensation."""
        return self._compensation

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The complete optimizer's groups; learning rates written here count from the next update on."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The complete optimizer's state, which the stages share."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The complete optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: gradients come from the stages
        """Closes the update with the present hyper-parameters."""
        assert self.engine is not None  # there is one whenever Trainer steps
        # A scheduler built on the complete optimizer looks for this; torch does not declare it.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        if self._shape != (shape := _shape_of(self.optimizer)):  # somebody has changed the groups themselves
            self._shape = shape
            self._attach()
        with unwatched():
            self.engine.step()

    @property
    def step_was_skipped(self) -> bool:
        """Whether the newest update has made no step on any stage, as gradients have overflowed."""
        return self.engine is not None and self.engine.step_was_skipped

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: gradients live in the workers."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the complete optimizer, when all updates that were closed before are done."""
        if self.engine is not None and not self.engine.closed:
            self.engine.rest()
        self.optimizer.add_param_group(param_group)
        self._attach()

    def state_dict(self) -> dict[str, Any]:
        """The complete optimizer's state after all updates so far."""
        if self.engine is not None and not self.engine.closed:
            self.engine.synchronize()
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replaces the complete optimizer's state.

        Raises:
            CheckpointError: the state is that of a run with another delay compensation.
        """
        found = {group.get("delay_compensation", "none") for group in state_dict["param_groups"]}
        if found != {self._compensation}:
            raise CheckpointError(
                f"the checkpoint was written with delay_compensation={min(found)!r}, this run has {self._compensation!r}; "
                "resume with the same, or start anew from its weights (model_name_or_path)"
            )
        self.optimizer.load_state_dict(state_dict)
        self._attach()

    def _attach(self) -> None:
        self._shape = _shape_of(self.optimizer)
        if self.engine is not None and not self.engine.closed:
            self.engine.rest()
            self.engine.attach(self.optimizer)


def _shape_of(optimizer: torch.optim.Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]
