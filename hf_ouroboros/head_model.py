"""The model as `Trainer.compute_loss` gets it: on the last stage, where it can be called, but not taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from .engine.streams import COLUMNS, SEGMENTS
from .errors import EngineError
from .partition import ModelCall


class HeadModel(nn.Module):
    """Stands in for the model in `Trainer.compute_loss`: calling it goes on where the last stage stands.

    Args:
        model: the model it stands in for.
        call: what is left of a call of it.
        without_labels: whether the model gives either loss or logits, and logits are wanted.
        alone: whether there is only one stage; then everything that the model has may be looked at.
    """

    def __init__(self, model: PreTrainedModel, call: ModelCall, without_labels: bool, alone: bool = False):
        super().__init__()
        self.config = model.config
        self._model = (model,)  # in a tuple: it must not be registered as a submodule
        self._alone = alone
        self._name = causal_name(model)
        self._call = call
        self._without_labels = without_labels

    def _get_name(self) -> str:
        return self._name

    def forward(self, **inputs: Any) -> ModelOutput:
        """What the model returns."""
        return call_model(self._call, inputs, self._without_labels)

    def __getattr__(self, name: str) -> Any:
        """What the model has besides, as far as stages don't change it.

        Raises:
            EngineError: it is a module, a tensor, or a method of the model, whose stages are elsewhere, at other moments.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.__dict__["_model"][0], name)
        of_model = isinstance(getattr(found, "__self__", None), nn.Module)
        if not self._alone and (of_model or isinstance(found, (nn.Module, torch.Tensor))):
            raise self._refusal(name)
        return found

    def _refusal(self, name: str) -> EngineError:
        what = "parameters" if "parameters" in name else name
        return EngineError(
            f"compute_loss asks for the model's {what}, but a penalty on them would belong to every stage at a moment of its "
            "own, and so would whatever else is computed with them; use weight_decay, or a penalty in an optimizer, or train "
            "with num_stages=1"
        )


def _of_model(name: str) -> Any:
    def asked(self: HeadModel, *args: Any, **kwargs: Any) -> Any:
        if not self._alone:
            raise self._refusal(name)
        return getattr(self._model[0], name)(*args, **kwargs)

    asked.__name__, asked.__doc__ = name, f"The model's `{name}`, or a refusal."
    return asked


for _name in (
    *("parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules", "children"),
    *("named_children", "get_parameter", "get_submodule", "get_buffer", "state_dict", "apply", "train", "eval"),
):
    setattr(HeadModel, _name, _of_model(_name))


def causal_name(model: PreTrainedModel) -> str:
    """Name of a model's class, for which Trainer decides whether label smoothing shifts the labels.

    Trainer does not know Transformer-XL any more, so that model goes by another one's name.
    """
    return "GPT2LMHeadModel" if model.config.model_type == "transfo-xl" else type(model).__name__


def call_model(call: ModelCall, inputs: Mapping[str, Any], without_labels: bool) -> ModelOutput:
    """Calls a model on its last stage.

    Args:
        call: the model.
        inputs: of a batch, labels included; its place in a stream is left out.
        without_labels: whether the model gives either loss or logits, and logits are wanted.
    """
    given = {key: value for key, value in inputs.items() if key not in (COLUMNS, SEGMENTS)}
    if not without_labels:
        return call(**given)
    output: Any = call(**{key: value for key, value in given.items() if key not in ("labels", "shift_labels")})
    return causal_lm_output(output.logits, given)


def causal_lm_output(logits: torch.Tensor, inputs: Mapping[str, Any]) -> CausalLMOutput:
    """Logits, and the token-weighted next-token loss if the inputs have labels (or labels already shifted)."""
    labels = inputs.get("labels")
    if labels is None and inputs.get("shift_labels") is None:
        return CausalLMOutput(logits=logits)
    loss = ForCausalLMLoss(
        logits,
        labels.to(logits.device) if labels is not None else None,
        vocab_size=logits.shape[-1],
        num_items_in_batch=inputs.get("num_items_in_batch"),
        shift_labels=inputs.get("shift_labels"),
    )
    return CausalLMOutput(loss=loss, logits=logits)
