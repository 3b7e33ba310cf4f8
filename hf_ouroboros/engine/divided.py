"""A backward in two parts: the gradient of a stage's input at once, those of most matrices when there is time.

    x ---> Linear 1 ---> GELU ---> Linear 2 ---> output         the way of the input: nodes that x's gradient passes
              |                       |
             W1                      W2                         each matrix joins that way in a product

The first part is one backward, which frees the graph, without these matrices. Of every product in which one of them joins it keeps the
gradient that arrives there, and what the matrix was multiplied with. The second part computes the gradients of the matrices from them,
by the formula of autograd's own product, and gives them to autograd where the matrix has come from. It is all that one backward
computes, each product once, each sum in the same order: a matrix that joins in a single product is a sum of one.

Everything else has its gradient in the first part: biases and norms, which are little work, matrices that join in several products
(their order of summation is autograd's), and what is multiplied in another way. Not divided at all is a backward with hooks of a
script on modules or tensors, which may look at gradients of matrices, and a compiled one, which computes all at once.

torch.distributed.pipelining divides likewise (`_backward.py`, private); it keeps the whole graph for the second part, and goes through
the nodes in which matrices join a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import UnsupportedModelError
from .graph import Node

_COMPILED = "CompiledFunctionBackward"

_PRODUCTS = {"MmBackward0": (1, "_saved_self"), "AddmmBackward0": (2, "_saved_mat1")}
"""Nodes of products: which of their inputs is the matrix, and how they save what it was multiplied with."""


@dataclass(eq=False)
class Junction:
    """A product in which a matrix joined the way of the input, after the first part has been there.

    Attributes:
        source: node that gives the matrix to the product.
        leaf: the matrix, perhaps in another precision, or transposed.
        kept: the gradient that has arrived, [N, B], and what the matrix [A, B] was multiplied with, [N, A].
        by_columns: whether the matrix lies in memory column by column, by which autograd chooses between two formulas.
    """

    source: Node
    leaf: torch.Tensor
    kept: tuple[torch.Tensor, torch.Tensor]
    by_columns: bool

    def __post_init__(self) -> None:
        self._versions = self._versions_now()

    @classmethod
    def of(cls, product: Any, source: Node, leaf: torch.Tensor, arrived: torch.Tensor) -> Junction:
        """Takes note of what arrives, before the node of the product lets go of the rest."""
        _, multiplied = _PRODUCTS[product.name()]
        rows, strides = product._saved_mat2_sym_sizes[0], product._saved_mat2_sym_strides
        by_columns = strides[0] == 1 and strides[1] == rows
        return cls(source, leaf, (arrived, getattr(product, multiplied).detach()), by_columns)

    def _versions_now(self) -> list[int]:
        return [tensor._version for tensor in self.kept]

    def run(self) -> None:
        """The gradient of the matrix, added to its `grad`.

        Raises:
            UnsupportedModelError: what arrived here, or what the matrix was multiplied with, has been written over.
        """
        if self._versions_now() != self._versions:
            raise UnsupportedModelError(
                "a backward writes into the gradient that it is given, or into what a matrix was multiplied with, so that gradients "
                "of matrices can't be computed later; use schedule='1f1b'"
            )
        arrived, multiplied = self.kept
        with torch.no_grad():
            found = (arrived.t() @ multiplied.conj()).t() if self.by_columns else multiplied.t().conj() @ arrived
        torch.autograd.backward((GradientEdge(self.source, 0),), (found,), inputs=[self.leaf])


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
        self._found: list[tuple[Node, Node, torch.Tensor]] = []  # products, what gives them a matrix, and the matrix
        self.junctions: list[Junction] = []
        way = graph.users_of(map(_node, self._inputs))
        for leaf in leaves:
            if _node(leaf) not in graph.users:
                continue
            if (nodes := None if graph.is_compiled else graph.joining(leaf, way)) is None:
                self._at_once.append(leaf)
            else:
                self._found.append((*nodes, leaf))

    @property
    def is_worth_it(self) -> bool:
        """Whether there is anything to be done later."""
        return bool(self._found)

    def run_first(self, backward: Callable[..., None], gradients: Sequence[torch.Tensor | None]) -> None:
        """Gradients of the inputs, and of the weights that are not for later, added to their `grad`; frees the graph.

        Args:
            backward: runs a backward; takes outputs, their gradients and arguments of `torch.autograd.backward`.
            gradients: of the loss with respect to the outputs.
        """
        handles = [self._watch(*each) for each in self._found]
        try:
            backward(self._outputs, gradients, inputs=[*self._inputs, *self._at_once])
        finally:
            for handle in handles:
                handle.remove()
        self._outputs, self._inputs, self._at_once, self._found = [], [], [], []

    def _watch(self, product: Node, source: Node, leaf: torch.Tensor) -> Any:
        def arrived(gradients: tuple[torch.Tensor | None, ...]) -> None:
            if gradients[0] is not None:
                self.junctions.append(Junction.of(product, source, leaf, gradients[0]))

        return product.register_prehook(arrived)

    def run_second(self) -> None:
        """Gradients of the other weights, added to their `grad`; lets go of what they are computed from on the way."""
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
        users: of each node, the nodes that its gradient comes from, each as often as it comes from there.
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

    def joining(self, leaf: torch.Tensor, way: Collection[Node]) -> tuple[Node, Node] | None:
        """The product in which a leaf joins a way, by itself and nowhere else, and what gives the leaf to it; None if there is none."""
        node = _node(leaf)
        while node not in self._roots and len(users := self.users[node]) == 1:
            user = users[0]
            if user in way:
                position, _ = _PRODUCTS.get(user.name(), (None, ""))
                if position is None or user.next_functions[position][0] is not node:
                    return None
                if getattr(user, "_saved_alpha", 1) != 1:
                    return None
                return user, node
            if sum(following is not None for following, _ in user.next_functions) != 1:
                return None
            node = user
        return None
