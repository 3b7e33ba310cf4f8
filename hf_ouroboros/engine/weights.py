"""Weight versions: what a forward and its pending backward see while the optimizer goes on.

A forward never uses a Parameter itself but a *leaf*: a tensor of its own on the same storage. Before an optimizer
step that would write into storage that a pending backward still needs, the Parameter moves to fresh storage; the
leaves keep the old one. Autograd's gradients are then those of the weights of the forward, exactly, and the
Parameter object stays the same for everybody else. (Writing through `.data` in place would be silently wrong.)
With weights="now" a pending backward needs no leaves before it replays its forward, so that nothing moves but tied matrices
that the last stage is still to use.

Predicted weights (delay compensation) are leaves on storage of their own, which no step writes into.

Under autocast, a leaf whose copy in lower precision is all that a pending backward needs gives its storage up (`forgo`).

A script may keep views of a Parameter (`p.data`, a `state_dict()`), which stay views of it while the optimizer steps: such a
Parameter keeps its storage, and its leaves are copies.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from ..partition.stand_ins import nothing


class WeightVersions:
    """The newest version of a stage's parameters as autograd leaves.

    Args:
        parameters: the stage's own parameters by name.
        direct: whether parameters are their own leaves, as no step comes before the backward of a forward.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], direct: bool = False):
        self.parameters = parameters
        self._direct = direct
        self._leaves: dict[str, torch.Tensor] | None = None
        self._predicted: dict[str, torch.Tensor] = {}
        self._lent: set[str] = set()  # parameters on whose storage there may be leaves
        self._moving: set[str] = set()  # those that have been trained
        self.have_views = False  # whether a script had views of some of them when their leaves were made
        # Of the newest version, in autocast's precision, as forwards make them.
        self.copies: dict[str, torch.Tensor] = {}

    def predict(self, predicted: dict[str, torch.Tensor]) -> None:
        """Lets leaves from now on, until the next step or prediction, have other values than their parameters.

        Args:
            predicted: values by name, in storage of their own; parameters without one keep their real values.
        """
        self._open()
        self._predicted = predicted

    def leaves(self) -> dict[str, torch.Tensor]:
        """Leaves of the newest version, the same objects until the next step or prediction."""
        if self._leaves is None:
            # `.data`, unlike `.detach()`, has a version counter of its own: the optimizer's writes to fresh
            # storage must not invalidate graphs on the old one.
            self.have_views = False
            self._leaves = {name: self._leaf(name, parameter) for name, parameter in self.parameters.items()}
        return self._leaves

    def _leaf(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        if self._direct and name not in self._predicted:
            return parameter
        if parameter.requires_grad:
            self._moving.add(name)
            if name in self._predicted:
                return self._predicted[name].requires_grad_()
        if name in self._moving and name not in self._lent and _has_views(parameter):
            self.have_views = True
            return parameter.data.clone().requires_grad_(parameter.requires_grad)
        self._lent.add(name)
        if parameter.requires_grad:
            return parameter.data.requires_grad_()
        # A frozen parameter has one version; of a kind of its own (packed weights, for example) it stays the object.
        return parameter.data if type(parameter) is nn.Parameter else parameter

    def forgo(self, names: Collection[str]) -> None:
        """Leaves of which nobody needs values any more take no memory from now on; they only collect gradients.

        Args:
            names: of parameters, none of which the next forward with these leaves will read.
        """
        for name in self._lent.intersection(names) - self._predicted.keys():
            leaf = self.leaves()[name]
            if leaf is not self.parameters[name]:
                leaf.data = nothing(leaf, leaf.device)
                self._lent.discard(name)

    def advance(self, in_use: Collection[str], stepping: Collection[str] = ()) -> None:
        """To be called before an in-place step.

        Args:
            in_use: names of parameters whose present values a pending forward or backward still needs.
            stepping: names of parameters that the step writes although they may have been frozen since.
        """
        self._open(stepping)
        self._predicted = {}
        lent = self._lent.intersection(in_use)
        self._move([name for name in lent if name in stepping or self.parameters[name].requires_grad])
        self._lent = set()

    def let_go(self, in_use: Collection[str]) -> None:
        """To be called before somebody else may write: what is in use keeps its values.

        Args:
            in_use: names of parameters whose present values a pending forward or backward still needs.
        """
        self._forget()
        self._move(self._lent.intersection(in_use))
        self._lent = set()

    def look_again(self) -> None:
        """Somebody else may have written, or frozen parameters: leaves are made anew."""
        self._forget()

    def _forget(self) -> None:
        self._leaves, self.copies = None, {}

    def _open(self, stepping: Collection[str] = ()) -> None:
        """Begins a version; of what stays as it was, the copies go on.

        Args:
            stepping: names of parameters that will be others although they may have been frozen.
        """
        self._leaves = None
        self.copies = {n: copy for n, copy in self.copies.items() if n not in stepping and self._stays(n, copy)}

    def _stays(self, name: str, copy: torch.Tensor) -> bool:
        """Whether a parameter is frozen and was when its copy was made, and a script has no view to write it by."""
        parameter = self.parameters[name]
        return not (copy.requires_grad or parameter.requires_grad or _has_views(parameter))

    def _move(self, names: Collection[str]) -> None:
        for name in names:
            self.parameters[name].data = self.parameters[name].data.clone()


def _has_views(parameter: nn.Parameter) -> bool:
    """Whether anything else is on a parameter's storage; to be asked where there are no leaves on it."""
    return type(parameter) is nn.Parameter and _holders_of(parameter) > _ALONE


def _holders_of(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


_ALONE = _holders_of(torch.empty(1))
"""How many hold the storage of a tensor without views: the tensor, and the object that asks."""


class TiedLink:
    """What first and last stage tell each other about the matrices that they share; they share a device, too.

    `weights[t]` are the versions that stage 0 used at tick t, for the last stage's forward of tick t.
    `gradients[t]` are the output side's gradients of tick t, for stage 0's backward of tick t. With delays those of K-1 ticks wait
    here, one by one: the update that will apply them is K-1 ticks ahead, and may close after any of these ticks (at the end of an
    epoch, with other data, or resumed with another M), so that no two of them are known to belong to the same sum.

    Args:
        names: names of the matrices, as stage 0 owns them.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.gradients: dict[int, dict[str, torch.Tensor]] = {}
