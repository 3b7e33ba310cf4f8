"""What can compete: names, their settings, and how many processes each of them needs.

    naive                                     the stock Trainer, one device computing at a time
    ddp                                       the stock Trainer with a whole model per process
    fsdp                                      FSDP2 (`fully_shard`): every process has a part of every layer, and rows of its own
    torch-gpipe  torch-1f1b  torch-zb         schedules of torch.distributed.pipelining, a process per device; zbv and
    torch-zbv  torch-dualpipev                dualpipev place their stages in a V
    pipelined lockstep 1f1b zero_bubble       ours, a thread per device; so is reference
    pipelined@processes  ...                  ours, a process per device

Settings stand behind a colon: `pipelined:M=8,learning_rate=5e-4@processes`. M splits the same global batch into so
many micro-batches; all others are options of TrainingArguments, for ours of OuroborosArguments.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from transformers import TrainingArguments

from hf_ouroboros import OuroborosArguments
from hf_ouroboros.schedules import SCHEDULES, names_where

from .pipelines import PIPELINES

ROWS_EACH = ("ddp", "fsdp")
"""Those whose processes share an update's micro-batches among them."""
SYNCHRONOUS = ("naive", *ROWS_EACH, *PIPELINES, *names_where(lambda schedule: schedule.is_synchronous))
"""Those that apply every gradient at once: they all compute the same numbers, up to the order of summation."""


class ContenderError(ValueError):
    """A contender that does not exist, or a setting that it does not have."""


class CannotRun(ContenderError):
    """A contender that exists and can't run with this torch, these devices, this number of micro-batches or this model."""


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Args:
        label: as it was given.
        kind: the part before settings and "@processes".
        in_processes: whether each device has a process of its own.
        micro_batches: micro-batches per update, M.
        settings: options of its arguments class, as text.
    """

    label: str
    kind: str
    in_processes: bool
    micro_batches: int
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether `OuroborosTrainer` runs it."""
        return self.kind in SCHEDULES

    @property
    def max_steps(self) -> int | None:
        """Updates of its runs, where its settings say so."""
        return next((int(value) for name, value in self.settings if name == "max_steps"), None)

    @property
    def is_synchronous(self) -> bool:
        """Whether it has to give the numbers of the naive run."""
        return self.kind in SYNCHRONOUS and not self.settings


def parse_contender(text: str, micro_batches: int, global_batch: int, num_devices: int) -> Contender:
    """Reads `name[:setting=value,...][@processes]`.

    Args:
        text: as on the command line.
        micro_batches: M where the contender names none.
        global_batch: rows per update.
        num_devices: how many devices there are.

    Raises:
        ContenderError: unknown name or setting; `CannotRun` where it is this torch, M or the number of devices.
    """
    body, _, where = text.partition("@")
    kind, _, listed = body.partition(":")
    others = ("naive", *ROWS_EACH, *PIPELINES)
    if kind not in (*others, *SCHEDULES) or where not in ("", "processes"):
        raise ContenderError(
            f"contender {text!r} is unknown; use {', '.join(others)}, or {', '.join(SCHEDULES)}, these also with @processes "
            "behind them"
        )
    ours = kind in SCHEDULES
    if where and not (ours and SCHEDULES[kind].uses_devices):
        raise ContenderError(
            f"contender {text!r}: @processes is for {', '.join(names_where(lambda s: s.uses_devices))}"
        )
    known = {f.name for f in dataclasses.fields(OuroborosArguments if ours else TrainingArguments) if f.init}
    settings = {}
    for part in filter(None, listed.split(",")):
        name, equals, value = part.partition("=")
        if not equals or (name != "M" and name not in known):
            raise ContenderError(
                f"contender {text!r}: {part!r} is no setting; use M=number or option=value with an option of "
                f"{'OuroborosArguments' if ours else 'TrainingArguments'}"
            )
        if name == "max_steps" and (not value.isdecimal() or int(value) == 0):
            raise ContenderError(f"contender {text!r}: {part!r} must be a number of updates")
        settings[name] = value
    chosen = settings.pop("M", str(micro_batches))
    if not chosen.isdecimal() or int(chosen) == 0 or global_batch % int(chosen):
        raise CannotRun(
            f"contender {text!r}: M={chosen} does not divide the {global_batch} rows of an update "
            "(--micro_batches times --batch_size)"
        )
    if (reason := _obstacle(kind, int(chosen), num_devices)) is not None:
        raise CannotRun(f"contender {text!r}: {reason}")
    in_processes = bool(where) or kind in (*ROWS_EACH, *PIPELINES)
    return Contender(text, kind, in_processes, int(chosen), tuple(settings.items()))


def _obstacle(kind: str, micro_batches: int, num_devices: int) -> str | None:
    """Why a contender can't run here; None where it can."""
    if kind in PIPELINES:
        return PIPELINES[kind].obstacle(micro_batches, num_devices)
    if kind in ROWS_EACH and micro_batches % num_devices:
        return (
            f"its M={micro_batches} micro-batches can't be shared by {num_devices} processes; "
            f"use a multiple of {num_devices}"
        )
    return None
