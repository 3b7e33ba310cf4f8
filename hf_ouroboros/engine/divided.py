"""A backward in two parts: the gradient of a stage's input at once, those of most weights when there is time.

    x ---> Linear 1 ---> GELU ---> Linear 2 ---> output         the way of the input: nodes that x's gradient passes
              |                       |
             W1                      W2                         each weight joins that way in a node

The first part runs the way of the input and keeps, of every node in which a weight joins, the gradient that arrives there. The
second part starts from each of these nodes with that gradient and computes the weights' only. It is all that one backward
computes, each product once, each sum in the same order: autograd asks a node for what it is told to, and a weight that joins
in a single node is a sum of one.

Everything else has its gradient in the first part: weights that join in several nodes (their order of summation is autograd's), and
those of functions in Python, which may do something else when they are called twice. Not divided at all is a backward with hooks of a
script on modules or tensors, which would be called twice, and a compiled one, which computes all at once.

torch.distributed.pipelining divides likewise (`_backward.py`, private); there, nodes in which a shared weight joins are gone through
once more, and gradients are summed by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import UnsupportedModelError
from .graph import Node

_COMPILED = "CompiledFunctionBackward"


@dataclass(eq=False)
class Junction:
    """A node in which weights join the way of the input.

    Attributes:
        node: the node.
        leaves: the weights.
        gradients: that arrived at the node, one per output of its forward; none before the first part.
        versions: of their values when they arrived.
    """

    node: Node
    leaves: list[torch.Tensor] = field(default_factory=list)
    gradients: tuple[torch.Tensor | None, ...] = ()
    versions: tuple[int, ...] = ()

    def keep(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Hook of the node: takes note of what arrives."""
        self.gradients = tuple(gradients)
        self.versions = self._versions()

    def _versions(self) -> tuple[int, ...]:
        return tuple(-1 if g is None else g._version for g in self.gradients)

    def run(self) -> None:
        """Gradients of the weights, added to their `grad`.

        Raises:
            UnsupportedModelError: what arrived here has been written over.
        """
        if self._versions() != self.versions:
            raise UnsupportedModelError(
                f"a backward writes into the gradient that it is given ({self.node.name()} got it, too), so that gradients of "
                "weights can't be computed later; use schedule='1f1b'"
            )
        found = {GradientEdge(self.node, i): g for i, g in enumerate(self.gradients) if g is not None}
        if found:
            torch.autograd.backward(tuple(found), tuple(found.values()), inputs=self.leaves)


class DividedBackward:
    """The backward of one micro-batch, divided.

    Args:
        outputs: of the forward.
        inputs: received tensors, of which the stage before waits for gradients.
        leaves: the weights that are trained.

    Attributes:
        junctions: where the second part starts, in the order in which the first one got there.
    """

    def __init__(self, outputs: Sequence[torch.Tensor], inputs: Iterable[torch.Tensor], leaves: Iterable[torch.Tensor]):
        self._outputs = list(outputs)
        graph = _Graph(outputs)
        self._inputs = [each for each in inputs if _node(each) in graph.users]
        self._at_once: list[torch.Tensor] = []
        self._found: dict[Node, Junction] = {}
        self.junctions: list[Junction] = []
        way = graph.users_of(map(_node, self._inputs))
        for leaf in leaves:
            node = _node(leaf)
            if node in graph.users:
                where = None if graph.is_compiled else graph.junction(node, way)
                if where is None:
                    self._at_once.append(leaf)
                else:
                    self._found.setdefault(where, Junction(where)).leaves.append(leaf)

    @property
    def is_worth_it(self) -> bool:
        """Whether there is anything to be done later."""
        return bool(self._found)

    def run_first(self, backward: Callable[..., None], gradients: Sequence[torch.Tensor | None]) -> None:
        """Gradients of the inputs, and of the weights that are not for later, added to their `grad`.

        Args:
            backward: runs a backward; takes outputs, their gradients and arguments of `torch.autograd.backward`.
            gradients: of the loss with respect to the outputs.
        """
        handles = [self._watch(junction) for junction in self._found.values()]
        try:
            backward(self._outputs, gradients, retain_graph=True, inputs=[*self._inputs, *self._at_once])
        finally:
            for handle in handles:
                handle.remove()
        self._outputs, self._inputs, self._at_once, self._found = [], [], [], {}

    def _watch(self, junction: Junction) -> Any:
        def arrived(gradients: tuple[torch.Tensor | None, ...]) -> None:
            junction.keep(gradients)
            self.junctions.append(junction)

        return junction.node.register_prehook(arrived)

    def run_second(self) -> None:
        """Gradients of the other weights, added to their `grad`; lets go of the graph on the way."""
        self.junctions.reverse()
        while self.junctions:
            self.junctions.pop().run()


def _node(tensor: torch.Tensor) -> Node:
    """Where a tensor's gradient arrives first."""
    return get_gradient_edge(tensor).node


class _Graph:
    """A graph, with its edges turned round.

    Args:
        outputs: where it begins.

    Attributes:
        users: of each node, the nodes that its gradient comes from.
        is_compiled: whether there is a node of a compiled function.
    """

    def __init__(self, outputs: Iterable[torch.Tensor]):
        self._roots = set(map(_node, outputs))  # what is handed on as it was received is a leaf
        self.users: dict[Node, list[Node]] = {root: [] for root in self._roots}
        self.is_compiled = False
        waiting = list(self._roots)
        while waiting:
            node = waiting.pop()
            self.is_compiled |= type(node).__name__ == _COMPILED
            for following, _ in node.next_functions:
                if following is not None:
                    if (users := self.users.get(following)) is None:
                        users = self.users[following] = []
                        waiting.append(following)
                    users.append(node)

    def users_of(self, nodes: Iterable[Node]) -> set[Node]:
        """The nodes that the gradients of these come from, near and far, and these."""
        found: set[Node] = set(nodes)
        waiting = list(found)
        while waiting:
            for user in self.users[waiting.pop()]:
                if user not in found:
                    found.add(user)
                    waiting.append(user)
        return found

    def junction(self, leaf: Node, way: Collection[Node]) -> Node | None:
        """Where a leaf joins a way: the only node of it that its gradient comes from; None if there isn't just one."""
        found: Node | None = None
        seen, waiting = {leaf}, [leaf]
        while waiting:
            node = waiting.pop()
            if node in self._roots:
                return None
            for user in self.users[node]:
                if user in way:
                    if found not in (None, user):
                        return None
                    found = user
                elif user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return None if isinstance(found, BackwardCFunction) else found
