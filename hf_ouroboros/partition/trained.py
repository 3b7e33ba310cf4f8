"""Which parameters of a split model are trained, and what follows from it: a gradient flows no further than it is needed.

    trained                    frozen          trained         frozen
    [stage 0: nothing] --x--> [stage 1] <---- [stage 2] <---- [stage 3]      x: no gradient is computed and none is sent

What only the first and the last stage have, a frozen tied matrix, may lie on two devices: the last stage has a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .ownership import named_parts
from .stage_plan import StageRow
from .stages import Stage
from .units import Unit

if TYPE_CHECKING:
    from .split import Partition


def first_trained(model: nn.Module, units: Sequence[Unit]) -> int:
    """Index of the first unit with a trained parameter; the number of units where there is none."""
    for index, unit in enumerate(units):
        if any(parameter.requires_grad for name in unit.modules for _, parameter in named_parts(model, name)):
            return index
    return len(units)


def shared_parameter_names(model: nn.Module, units: Sequence[Unit]) -> tuple[str, ...]:
    """Names, on the embedding side, of the matrices that embedding and head share, frozen or not."""
    head = {id(p) for u in units if u.kind == "head" for name in u.modules for _, p in named_parts(model, name)}
    found: dict[int, str] = {}
    for name in units[0].modules:
        for full, parameter in named_parts(model, name):
            if id(parameter) in head:
                found.setdefault(id(parameter), full)
    return tuple(found.values())


def refresh(partition: Partition) -> Partition:
    """The partition as parameters are frozen now; its stages know it, too.

    Raises:
        UnsupportedModelError: a matrix that embedding and head share was frozen, so that they are apart, and is not now.
    """
    model, stages = partition.model, partition.stages
    units = stages[0].units
    for name in shared_parameter_names(model, units) if len(stages) > 1 else ():
        if name not in partition.tied_names and model.get_parameter(name).requires_grad:
            raise UnsupportedModelError(
                f"{name}, which embedding and head share, was frozen when the stages were made, and is to be trained now; "
                "create the trainer after unfreezing it"
            )
    start = first_trained(model, units)
    for stage in stages:
        stage.first_trained = start
    with torch.no_grad():
        for original, copy in partition.copies:
            copy.copy_(original)
    rows = tuple(with_trained(row, partition.owned(row.stage).values()) for row in partition.plan.rows)
    return replace(partition, plan=replace(partition.plan, rows=rows))


def with_trained(row: StageRow, parameters: Iterable[nn.Parameter]) -> StageRow:
    """A row of a plan that tells how many of the stage's parameters are trained."""
    trained = [p for p in parameters if p.requires_grad]
    return replace(
        row,
        trained_parameters=sum(p.numel() for p in trained),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
    )


def copy_shared(
    stages: Sequence[Stage], devices: Sequence[torch.device], tied: Sequence[nn.Parameter]
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Gives the last stage a copy of what it shares with the first one, if that is on another device.

    Args:
        stages: of a model, all in this process, not placed yet.
        devices: of every stage.
        tied: what they share and train, for which they are on one device.

    Returns:
        (the model's parameter, the last stage's) of every copy.
    """
    if len(stages) < 2 or devices[0] == devices[-1]:
        return []
    first = {id(p) for p in stages[0].parameters()} - {id(p) for p in tied}
    copies: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in stages[-1].modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in first:
                if id(parameter) not in copies:
                    copy = nn.Parameter(parameter.detach().to(devices[-1], copy=True), requires_grad=False)
                    copies[id(parameter)] = parameter, copy
                module._parameters[name] = copies[id(parameter)][1]
    return list(copies.values())
