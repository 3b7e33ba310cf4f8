"""Pending backwards with weights of now (weights="now"), as a checkpoint holds them.

With weights of then, a checkpoint holds the gradients that are still to be applied. Here they can't be computed yet: they will be
taken at weights that are still to come. So it holds what they will be computed of, by micro-batch and stage:

    batch.NAME, received.NAME, memory.NAME    what the forward was given
    shape.NAME                                shapes of what it has put out, as tensors that hold nothing
    gradient.NAME                             of its output, where the stage after has been at it: of the one that is due next
    head.NAME                                 the last stage's side of the gradient of a tied matrix, for the first stage
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from ..partition import Boundary, Memory, Stage
from .host_copies import known
from .in_flight import InFlight

Tensors = dict[str, torch.Tensor]
_MEMORY = "memory"
"""There is one, perhaps an empty one."""


@dataclass
class Pending:
    """A micro-batch that waits for its backward on one stage.

    Args:
        item: with what its forward was given.
        gradient: of its output; None where the stage after has not come to it.
        head: gradients of tied matrices that the last stage has computed.
    """

    item: InFlight
    gradient: Boundary | None = None
    head: Tensors = field(default_factory=dict)

    def tensors(self) -> Tensors:
        """Copies on the host, by the names of a checkpoint."""
        item, named = self.item, {}
        parts = {
            "batch": item.batch,
            "received": item.received,
            "memory": item.memory,
            "shape": item.shapes,
            "gradient": self.gradient,
            "head": self.head,
        }
        for kind, tensors in parts.items():
            for name, tensor in (tensors or {}).items():
                plain = tensor.detach().as_subclass(torch.Tensor)
                named[f"{kind}.{name}"] = plain.to("cpu", copy=True).contiguous()
        if item.memory is not None:
            named[_MEMORY] = torch.empty(0)
        return named

    @classmethod
    def of(cls, tick: int, tensors: Mapping[str, torch.Tensor], stage: Stage, device: torch.device) -> Pending:
        """Inverse of `tensors()`.

        Args:
            tick: the micro-batch.
            tensors: by name.
            stage: where it waits.
            device: of the stage.
        """

        def named(kind: str) -> Tensors:
            return {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{kind}.")}

        def here(kind: str) -> Tensors:
            return {name: tensor.to(device, copy=True) for name, tensor in named(kind).items()}

        memory: Memory | None = here("memory") if _MEMORY in tensors else None
        received: Boundary | None = None
        if not stage.is_first:
            received = {name: t.requires_grad_(stage.trains(name, t)) for name, t in here("received").items()}
        item = InFlight(tick, known(here("batch"), named("batch")), {}, received, memory, shapes=named("shape"))
        return cls(item, here("gradient"), here("head"))


def due_next(ticks: Collection[int], delay: int) -> int | None:
    """After whole slots: the micro-batch whose backward is a stage's next; the stage after has been at it. None for none.

    Args:
        ticks: that are in flight there.
        delay: of the stage.
    """
    return min(ticks) if len(ticks) == delay > 0 else None
