"""From `delay_compensation` to what a run does: names, their options, and which of them go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..errors import UnsupportedOptionError
from ..options import shown
from .advice import AUTOMATIC
from .basis_rotation import BasisRotation
from .compensation import GIVEN_BY, Compensation
from .error_feedback import ErrorFeedback
from .gap_aware import GapAware
from .lr_rescale import LearningRateRescaling
from .muon import Muon
from .nesterov import Nesterov
from .weight_prediction import WeightPrediction

OptimizerChoice = Nesterov | Muon | BasisRotation
OPTIMIZERS: dict[str, type[OptimizerChoice]] = {kind.name: kind for kind in (Nesterov, Muon, BasisRotation)}
# In the order in which they are applied.
COMPENSATIONS: dict[str, type[Compensation]] = {
    kind.name: kind for kind in (WeightPrediction, GapAware, ErrorFeedback, LearningRateRescaling)
}
NAMES = (*OPTIMIZERS, *COMPENSATIONS)

_EXCLUDED: dict[frozenset[str], str] = {
    **{
        frozenset(pair): "each of them is an optimizer of its own"
        for pair in (("nesterov", "muon"), ("nesterov", "basis_rotation"), ("muon", "basis_rotation"))
    },
    frozenset({"nesterov", "weight_prediction"}): "both look ahead by the delay, so it would be compensated twice",
    frozenset({"nesterov", "error_feedback"}): "both extrapolate over the delay, so it would be compensated twice",
    frozenset(
        {"weight_prediction", "gap_aware"}
    ): "the gap would be measured from weights at which no gradient was taken",
    frozenset({"error_feedback", "gap_aware"}): "one adds to late gradients what the other takes away",
}

_OF_THEN = {
    "weight_prediction": "it brings the weights of a forward near those that its late gradient is applied to, which are the weights of now",
    "gap_aware": "it measures how far weights have moved since the gradient was taken, and those of now have not",
}


@dataclass(frozen=True)
class Choice:
    """What a run does about its delays.

    Args:
        optimizer: makes the run's optimizer; None for the one that the run has anyway.
        compensations: in the order in which they are applied.
    """

    optimizer: OptimizerChoice | None = None
    compensations: tuple[Compensation, ...] = ()

    def __str__(self) -> str:
        names = [self.optimizer.name] if self.optimizer else []
        return "+".join([*names, *(c.name for c in self.compensations)]) or "none"

    @property
    def options(self) -> str:
        """`delay_compensation_args` that gives what is not the default; "" where nothing is."""
        parts = [part for part in (self.optimizer, *self.compensations) if part is not None]
        values = ((field, getattr(part, field.name)) for part in parts for field in fields(part))
        return ",".join(f"{field.name}={value}" for field, value in values if value != field.default)

    def check_weights(self, weights: str, asked: str) -> None:
        """Refuses what has no meaning where late backwards use the weights of now.

        Args:
            weights: of late backwards, "then" or "now".
            asked: `delay_compensation`, which may be one of `advice.AUTOMATIC`.

        Raises:
            UnsupportedOptionError: names the compensation.
        """
        for compensation in self.compensations if weights == "now" else ():
            if compensation.name in _OF_THEN:
                raise UnsupportedOptionError(
                    f"delay_compensation={asked!r}{f' is {self} here, and' if asked in AUTOMATIC else ':'} {compensation.name} does not go "
                    f"together with weights='now': {_OF_THEN[compensation.name]}; name another compensation or 'none', or leave weights "
                    "at 'then'"
                )

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises UnsupportedOptionError where a compensation has no meaning with the optimizer."""
        for compensation in self.compensations:
            compensation.check(optimizer)


def choose(text: str | Sequence[str], options: str | None = None) -> Choice:
    """Reads `delay_compensation` and `delay_compensation_args`.

    Args:
        text: "none", or names joined by "+", or a list of names.
        options: "name=value" joined by ","; each belongs to the one named compensation that has it.

    Raises:
        UnsupportedOptionError: unknown names, or names that don't go together.
    """
    names = [name.strip() for name in (text.split("+") if isinstance(text, str) else text)]
    if names == ["none"]:
        names = []
    for name in names:
        if name == "auto":
            raise UnsupportedOptionError(
                f"delay_compensation={text!r}: auto stands alone, or behind muon as muon+auto, and chooses the others itself"
            )
        if name not in NAMES:
            raise UnsupportedOptionError(
                f"delay_compensation={text!r}: {name!r} is unknown; use none, auto, muon+auto, or one or several of "
                f"{', '.join(NAMES)}, joined by '+'"
            )
        if names.count(name) > 1:
            raise UnsupportedOptionError(f"delay_compensation={text!r} names {name!r} twice")
    for pair, reason in _EXCLUDED.items():
        if pair <= set(names):
            raise UnsupportedOptionError(
                f"delay_compensation={text!r}: {' and '.join(n for n in NAMES if n in pair)} don't go together: {reason}; "
                "use one of them"
            )
    kinds = {name: OPTIMIZERS.get(name) or COMPENSATIONS[name] for name in NAMES if name in names}
    values = _read_options(options, kinds)
    optimizers: Mapping[str, Callable[..., OptimizerChoice]] = OPTIMIZERS  # which take what is written, too
    compensations: Mapping[str, Callable[..., Compensation]] = COMPENSATIONS
    return Choice(
        next((make(**values[name]) for name, make in optimizers.items() if name in names), None),
        tuple(make(**values[name]) for name, make in compensations.items() if name in names),
    )


def _read_options(text: str | None, kinds: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The options of each compensation as they are written; its class reads them."""
    values: dict[str, dict[str, str]] = {name: {} for name in kinds}
    owners = {field.name: name for name, kind in kinds.items() for field in fields(kind)}
    for item in filter(None, (part.strip() for part in (text or "").split(","))):
        option, _, written = (part.strip() for part in item.partition("="))
        if option not in owners:
            raise UnsupportedOptionError(
                f"{GIVEN_BY}: {shown(item)} is no option of delay_compensation={'+'.join(kinds) or 'none'!r}; its "
                f"options are {', '.join(f'{name}=...' for name in owners) or 'none at all'}"
            )
        if option in values[owners[option]]:
            raise UnsupportedOptionError(f"{GIVEN_BY}: {option} is given twice; leave one of them out")
        values[owners[option]][option] = written
    return values
