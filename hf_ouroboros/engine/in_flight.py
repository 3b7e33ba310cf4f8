"""A micro-batch between its forward and its backward on one stage: where its graph begins and ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..partition import Boundary, Memory, to_device


@dataclass
class InFlight:
    """A micro-batch between its forward and its backward on one stage."""

    tick: int
    batch: dict[str, torch.Tensor]
    leaves: dict[str, torch.Tensor]
    received: Boundary | None
    memory: Memory | None = field(default=None, repr=False)  # before the forward
    full_batch: Mapping[str, Any] | None = None
    context: Any = None
    output: Boundary | torch.Tensor | None = field(default=None, repr=False)
    copies: dict[str, torch.Tensor] = field(
        default_factory=dict, repr=False
    )  # of its weight version, in lower precision
    meeting: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)  # tied matrices, as the stage used them
    gradients: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)  # that a divided backward had at once
    shapes: Boundary = field(default_factory=dict, repr=False)  # of the output: empty tensors, of one dimension more
    scale: float | None = None  # of the loss

    def forget_weights(self) -> None:
        """After a forward that will be replayed with other weights: lets go of those that it used."""
        self.leaves, self.copies, self.meeting = {}, {}, {}

    def taken(self) -> dict[str, torch.Tensor]:
        """Gradients that a backward has left in the weights of the forward, taken out of them."""
        gradients: dict[str, torch.Tensor] = {}
        for name, leaf in self.leaves.items():
            if leaf.requires_grad and leaf.grad is not None:
                gradients[name], leaf.grad = leaf.grad, None
        return gradients

    def unscale(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Divides gradients of weights by the scale of the loss, a power of two."""
        if self.scale is not None:
            for gradient in gradients.values():
                gradient.mul_(1 / self.scale)

    def upstream(self) -> Boundary | None:
        """After a backward: the gradient for the stage before; None on the first stage."""
        if self.received is None:
            return None
        # What had no effect on the loss has a gradient of zeros: the stage before waits for one.
        return {
            name: torch.zeros_like(t) if t.grad is None else t.grad
            for name, t in self.received.items()
            if t.requires_grad
        }

    def given(self) -> list[torch.Tensor]:
        """The tensors in which the stage's graph may end."""
        return [*self.leaves.values(), *(self.received or {}).values(), *(self.memory or {}).values()]


def shapes_of(output: Boundary | torch.Tensor) -> Boundary:
    """Shapes and dtypes of what a stage has put out, as tensors that hold nothing, so that they are saved as others are."""
    named = {} if isinstance(output, torch.Tensor) else output
    return {name: torch.empty((0, *tensor.shape), dtype=tensor.dtype) for name, tensor in named.items()}


def whole(shapes: Boundary) -> Boundary:
    """Tensors without values of the shapes and dtypes that `shapes_of` has noted."""
    return {name: torch.empty(t.shape[1:], dtype=t.dtype, device="meta") for name, t in shapes.items()}


def detached(output: Boundary | torch.Tensor) -> Boundary | torch.Tensor:
    """What a stage has put out, without its graph."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    return {name: tensor.detach() for name, tensor in output.items()}


def are_equal(one: Boundary | torch.Tensor, other: Boundary | torch.Tensor) -> bool:
    """Whether two forwards of a stage have put out the same, to the last bit."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def roots_of(
    output: Boundary | torch.Tensor, gradient: Boundary | None, device: torch.device, scale: float | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Where a backward begins, and the gradients there: the loss, scaled or not, or whatever gradients have come for."""
    if isinstance(output, torch.Tensor):
        return ([output], [scaled_one(output, scale)]) if output.requires_grad else ([], [])
    given = to_device(gradient or {}, device)
    names = [name for name in output if name in given and output[name].requires_grad]
    return [output[name] for name in names], [given[name] for name in names]


def scaled_one(loss: torch.Tensor, scale: float | None) -> torch.Tensor | None:
    """The gradient with which the backward of a loss begins; None for that of its own."""
    return None if scale is None else torch.full_like(loss, scale, requires_grad=False)


class BufferCheck:
    """Refuses a replay of a forward that writes into buffers: it would find others, and write a second time.

    Args:
        stage: the stage.
        option: for which its forwards are replayed; None if they aren't.
    """

    def __init__(self, stage: torch.nn.Module, option: str | None):
        self._option = option
        self._buffers = {} if option is None else dict(stage.named_buffers())
        self._versions = self._now()

    def _now(self) -> dict[str, int]:
        return {name: buffer._version for name, buffer in self._buffers.items()}

    def forward(self) -> None:
        """To be called after a forward.

        Raises:
            UnsupportedModelError: it has written into a buffer.
        """
        if self._buffers and (found := self._now()) != self._versions:
            name = next(name for name in found if found[name] != self._versions[name])
            raise UnsupportedModelError(
                f"a forward writes into the buffer {name}, so that {self._option} would replay it with another value; train "
                f"without {self._option}"
            )
