"""What a stage's graph ends in: its own weights and what it was given, or else a gradient would be lost.

A script can reach a parameter in many ways (a closure, `self.model`, a global, a hook). Wherever it has got it from, the graph
of what is computed with it ends in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError, UnsupportedOptionError

Node = torch.autograd.graph.Node
"""A node of autograd's graph."""


def beginning_of(tensor: torch.Tensor) -> Node | None:
    """Where the graph of a tensor begins, unnoticed by those who watch what scripts look at."""
    with torch._C.DisableTorchFunction():
        return tensor.grad_fn


def nodes_of(tree: Any) -> set[Node]:
    """Where the graphs of the tensors in nested containers begin."""
    if isinstance(tree, torch.Tensor):
        return {node} if (node := beginning_of(tree)) is not None else set()
    values = tree.values() if hasattr(tree, "values") else tree if isinstance(tree, (tuple, list)) else ()
    return set().union(*map(nodes_of, values))


def leaves_of(roots: Iterable[torch.Tensor], stops: Collection[Node] = ()) -> Iterator[torch.Tensor]:
    """The leaves that tensors depend on.

    Args:
        roots: the tensors.
        stops: nodes whose graphs are not looked at.
    """
    seen = set(stops)
    waiting = []
    for root in roots:
        if (node := beginning_of(root)) is not None:
            waiting.append(node)
        elif root.requires_grad:
            yield root
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        waiting.extend(following for following, _ in node.next_functions if following is not None)


def foreign_leaf(
    roots: Iterable[torch.Tensor], allowed: Iterable[torch.Tensor], stops: Collection[Node] = ()
) -> torch.Tensor | None:
    """A leaf that tensors depend on and that is none of those allowed; None if there is none.

    Args:
        roots: the tensors.
        allowed: leaves.
        stops: nodes whose graphs are not looked at.
    """
    own = {id(tensor) for tensor in allowed}
    return next((leaf for leaf in leaves_of(roots, stops) if id(leaf) not in own), None)


def refuse_hooks_on_saved_tensors(where: str) -> None:
    """Refuses what would meet the tensors that a backward needs in one place of several.

    Args:
        where: what happens within such hooks.

    Raises:
        UnsupportedOptionError: this is within `torch.autograd.graph.saved_tensors_hooks`, or `save_on_cpu`.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("they are in use"):  # which is refused if they are
            return
    except RuntimeError as error:
        raise UnsupportedOptionError(
            f"{where} within torch.autograd.graph.saved_tensors_hooks (or save_on_cpu), which would not meet what other stages "
            "save for their backward; put them around the forward of layers, or leave them out (recompute=True saves memory)"
        ) from error


class GraphCheck:
    """Refuses graphs that end in other stages, or in parameters past the stage's own weights.

    Args:
        model: whose parameters have names.
        stage: index of the stage.
    """

    def __init__(self, model: nn.Module, stage: int):
        self._model, self._stage = model, stage
        self._forwards = 1

    def forward(self, outputs: Iterable[torch.Tensor], allowed: Iterable[torch.Tensor]) -> None:
        """Looks at the whole graph of the first forward.

        Raises:
            UnsupportedModelError: it ends in a leaf that is none of those allowed.
        """
        if not self._forwards:
            return
        self._forwards -= 1
        if (leaf := foreign_leaf(outputs, allowed)) is not None:
            raise UnsupportedModelError(
                f"the forward of stage {self._stage} reaches {self._named(leaf)} by a way of its own (a hook or a closure, for "
                "instance), at a moment and with a gradient that belong to no micro-batch; use parameters by the modules "
                "that have them, or train with num_stages=1"
            )

    def loss(self, loss: torch.Tensor, outputs: Collection[Node], allowed: Iterable[torch.Tensor]) -> None:
        """Looks at what a script has done to what the model has put out.

        Raises:
            UnsupportedOptionError: the loss depends on a leaf that is none of those allowed.
        """
        if beginning_of(loss) in outputs:  # the model's own loss
            return
        if (leaf := foreign_leaf([loss], allowed, outputs)) is not None:
            raise UnsupportedOptionError(
                f"the loss reaches {self._named(leaf)} past the model's outputs, but a penalty on weights, or a loss of what "
                "other stages hold, would belong to every stage at a moment of its own; use weight_decay, or a penalty in "
                "an optimizer, or train with num_stages=1"
            )

    def _named(self, leaf: torch.Tensor) -> str:
        names = [name for name, parameter in self._model.named_parameters() if parameter is leaf]
        return f"the parameter {names[0]}" if names else f"a tensor of shape {list(leaf.shape)} that is to be trained"
