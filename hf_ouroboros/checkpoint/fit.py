"""Whether a checkpoint was written by a run like this one: its optimizer, what that holds, and its scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..adapters.describing import adapter_options, check_base, frozen_digests
from ..errors import CheckpointMismatchError

ANEW = "or start anew from its weights (model_name_or_path)"


def describe_run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    compensation: str,
    scheduler: Any = None,
    frozen: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What the manifest says of a run, ready for JSON.

    Args:
        model: whose parameters the optimizer steps.
        optimizer: the complete optimizer itself, without the faces that Trainer sees.
        compensation: what is done about the delay.
        scheduler: of the learning rate; None where it is not known yet.
        frozen: digests of the model's frozen parameters, also of those of other processes; None for those that are here.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
    run: dict[str, Any] = {
        "optimizer": type(optimizer).__name__,
        "delay_compensation": compensation,
        "groups": groups,
    }
    if options := adapter_options(model):
        run |= {"adapters": options, "frozen": frozen_digests(model) if frozen is None else frozen}
    return run if scheduler is None else {**run, "scheduler": type(scheduler).__name__}


def check_run(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuses the checkpoint of a run that differs from this one in what both descriptions say.

    Raises:
        CheckpointMismatchError: names what differs, with both values.
    """
    for key, advice in (
        ("delay_compensation", "resume with the same"),
        ("optimizer", "resume with the same optim and optim_args"),
        ("scheduler", "resume with the same lr_scheduler_type"),
    ):
        if key in saved and key in here and saved[key] != here[key]:
            raise CheckpointMismatchError(
                f"the checkpoint was written with {key}={saved[key]!r}, this run has {here[key]!r}; {advice}, {ANEW}"
            )
    check_base(saved, here)
    if "groups" in saved and saved["groups"] != here["groups"]:
        raise CheckpointMismatchError(
            f"the checkpoint's {saved['optimizer']} does not hold the parameters of this run's: "
            f"{_difference(saved['groups'], here['groups'])}; resume with the same model, frozen layers and parameter "
            f"groups, {ANEW}"
        )


def _difference(saved: Sequence[Sequence[str]], here: Sequence[Sequence[str]]) -> str:
    there = {name: index for index, group in enumerate(saved) for name in group}
    now = {name: index for index, group in enumerate(here) for name in group}
    if gone := sorted(there.keys() - now.keys()):
        return f"{gone[0]!r} (and {len(gone) - 1} more) is in the checkpoint's only"
    if new := sorted(now.keys() - there.keys()):
        return f"{new[0]!r} (and {len(new) - 1} more) is in this run's only"
    if moved := sorted(name for name in there if there[name] != now[name]):
        return f"{moved[0]!r} is in group {there[moved[0]]} there, in group {now[moved[0]]} here"
    return "they are in another order"
