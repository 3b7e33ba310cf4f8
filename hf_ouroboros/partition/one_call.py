"""The model on the last stage, as a script calls it: once, with the batch's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from ..errors import EngineError
from .meta import logits_of


class OneCall:
    """The model on the last stage, which can be called once, with the inputs that the other stages have computed with.

    Args:
        run: runs what is left of the model on inputs.
        batch: the inputs of the other stages.
        keys: what of a batch stages compute with.
        foreign_outputs: names of the arguments that ask for what layers put out.
        alone: whether there are no other stages; then everything is allowed.
    """

    def __init__(
        self,
        run: Callable[[dict[str, Any]], Any],
        batch: Mapping[str, torch.Tensor],
        keys: frozenset[str],
        foreign_outputs: frozenset[str],
        alone: bool,
    ):
        self._run, self._batch, self._keys, self._foreign_outputs = run, batch, keys, foreign_outputs
        self._alone = alone
        self._called = False

    def __call__(self, **inputs: Any) -> ModelOutput:
        """What the model returns.

        Raises:
            EngineError: it is the second call, the inputs are others than the batch's, or the output is asked for what
                other stages have.
        """
        if not self._alone:
            if self._called:
                raise EngineError(
                    "the loss calls the model a second time for a micro-batch, but the stages before the last one have run "
                    "it once; compute the loss of one call, or train with stock Trainer"
                )
            changed = [key for key in self._keys if inputs.get(key) is not self._batch.get(key)]
            if changed:
                raise EngineError(
                    f"the loss calls the model with another {', '.join(sorted(changed))} than the batch's, but the stages "
                    "before the last one have run on the batch; change the inputs in the data collator"
                )
            if wanted := [key for key in self._foreign_outputs if inputs.get(key)]:
                raise EngineError(
                    f"{wanted[0]}=True asks for what layers of other stages put out, which they keep to themselves; leave "
                    "it out, or run the saved model by itself"
                )
        self._called = True
        output = self._run(inputs)
        return output if isinstance(output, ModelOutput) else CausalLMOutput(logits=logits_of(output))
