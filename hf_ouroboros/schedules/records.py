"""One record per schedule: all that anybody has to know of it. Who adds a record here has added a schedule.

Every schedule is a way to execute the same update rule, with delays or without; `reference` is the rule itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .filling import filling_programs, most_kept
from .instructions import Program
from .interleave import dataflow_programs, drained_programs, lockstep_programs

MakePrograms = Callable[[Sequence[int], Sequence[float], Sequence[float], int, bool], list[Program]]
"""As `device_programs`, of one schedule."""


def _until_its_delay(stage: int, num_stages: int, micro_batches: int) -> int:
    """A stage is K-1-k ticks late."""
    return num_stages - stage


def _within_an_update(stage: int, num_stages: int, micro_batches: int) -> int:
    """The same, but no further than the update goes."""
    return min(micro_batches, num_stages - stage)


def _one_per_stage(num_stages: int, micro_batches: int) -> int:
    """All stages finish their forwards first, and the last one has its backward before the first one."""
    return num_stages


def _until_the_first_is_done(num_stages: int, micro_batches: int) -> int:
    """The first stage is through with a tick before the last one is K-1 ticks further; two stages always meet."""
    return max(2, num_stages - 1)


def _within_an_update_until_done(num_stages: int, micro_batches: int) -> int:
    """The same, but no further than the update goes."""
    return min(micro_batches, _until_the_first_is_done(num_stages, micro_batches))


def _within_an_update_when_asked(num_stages: int, micro_batches: int) -> int:
    """Gradients of weights come when nothing else is to be done, often one by one."""
    return min(micro_batches, max(1, num_stages - 1))


@dataclass(frozen=True)
class Schedule:
    """What there is to know of a schedule.

    Args:
        name: as users give it.
        summary: what it is, in a few words.
        colour: of its curve.
        programs: makes the devices' programs; None where one device does all in turn and simulates the delays.
        is_synchronous: whether every update is drained before its step, so that no gradient is late and one version of the
            weights lives; else the stages have the delays of the update rule, and keep the versions of pending backwards.
        allows_global_norm: whether all stages may wait for each other in every update (`clip_scope="global"`).
        allows_halves: whether the head's side of a tied matrix's gradient can be there a delay before the embedding's
            (`tied_gradient="paper"`).
        divides_backward: whether all stages but the first compute gradients of weights later than that of their input.
        in_flight: (stage, K, M) -> most micro-batches that a stage keeps activations of.
        output_sides: (K, M) -> most micro-batches whose output-side gradients of a tied matrix wait for the first stage, which shares
            a device with the last one.
    """

    name: str
    summary: str
    colour: str
    programs: MakePrograms | None
    is_synchronous: bool = False
    allows_global_norm: bool = True
    allows_halves: bool = False
    divides_backward: bool = False
    in_flight: Callable[[int, int, int], int] = _until_its_delay
    output_sides: Callable[[int, int], int] = _until_the_first_is_done

    @property
    def uses_devices(self) -> bool:
        """Whether several devices work at a time."""
        return self.programs is not None

    def delay(self, stage: int, num_stages: int) -> int:
        """How many ticks late a stage applies its gradients."""
        return 0 if self.is_synchronous else num_stages - 1 - stage

    def old_versions(self, stage: int, num_stages: int, micro_batches: int) -> int:
        """Versions of a stage's weights that pending backwards need besides the newest."""
        return -(-self.delay(stage, num_stages) // micro_batches)


SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule(
            "pipelined",
            "the update rule as a dataflow, all devices busy",
            "#d9772b",
            dataflow_programs,
            allows_global_norm=False,
        ),
        Schedule(
            "lockstep",
            "the paper's",
            "#2f2f36",
            lockstep_programs,
            allows_halves=True,
            output_sides=_one_per_stage,
        ),
        Schedule(
            "1f1b",
            "synchronous, exact gradients, with bubbles",
            "#3b78b8",
            drained_programs,
            is_synchronous=True,
            in_flight=_within_an_update,
            output_sides=_within_an_update_until_done,
        ),
        Schedule(
            "zero_bubble",
            "synchronous, exact gradients, those of weights fill the bubbles",
            "#1b7a52",
            filling_programs,
            is_synchronous=True,
            divides_backward=True,
            in_flight=most_kept,
            output_sides=_within_an_update_when_asked,
        ),
        Schedule("reference", "one device, delays simulated", "#6b6b73", None, allows_halves=True),
    )
}
"""By name."""

DEFAULT = next(iter(SCHEDULES))
"""The schedule of those who ask for none."""


def schedule_named(name: str) -> Schedule:
    """The record of a schedule.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is unknown; use one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def names_where(test: Callable[[Schedule], bool]) -> list[str]:
    """Names of the schedules for which something is true."""
    return [schedule.name for schedule in SCHEDULES.values() if test(schedule)]


def device_programs(
    schedule: str,
    placement: Sequence[int],
    forward_costs: Sequence[float],
    backward_costs: Sequence[float],
    micro_batches: int = 1,
    exchange: bool = False,
) -> list[Program]:
    """The programs of all devices under a schedule that uses devices.

    Args:
        schedule: its name.
        placement: device of each stage.
        forward_costs: relative time of each stage's forward.
        backward_costs: relative time of each stage's backward and share of the step.
        micro_batches: ticks per update, for the simulation.
        exchange: whether gradient norms are exchanged at every update.
    """
    make = schedule_named(schedule).programs
    if make is None:
        raise ValueError(f"schedule {schedule!r} has no programs: it does everything in turn")
    return make(placement, forward_costs, backward_costs, micro_batches, exchange)
