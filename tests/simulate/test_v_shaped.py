"""Schedules in a V: the orders of torch.distributed.pipelining, and the picture of the module."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import ScheduleDualPipeV, ScheduleZBVZeroBubble

from hf_ouroboros.schedules.instructions import Backward, Forward, InputGradient, Instruction, WeightGradient
from hf_ouroboros.simulate import v_shaped
from hf_ouroboros.simulate.v_shaped import dualpipev, v_placement, zb_v

KINDS = {
    "FORWARD": Forward,
    "BACKWARD_INPUT": InputGradient,
    "BACKWARD_WEIGHT": WeightGradient,
    "FULL_BACKWARD": Backward,
}


def flat(actions: list[Any]) -> Iterator[Instruction]:
    """Torch's actions as our instructions."""
    for action in filter(None, actions):
        if action.computation_type.name == "OVERLAP_F_B":
            yield from flat(action.sub_actions)
        else:
            yield KINDS[action.computation_type.name](action.stage_index, action.microbatch_index)


@pytest.mark.parametrize(
    ("ours", "theirs", "least"), [(zb_v, ScheduleZBVZeroBubble, 1), (dualpipev, ScheduleDualPipeV, 2)]
)
def test_orders_are_those_of_torch(ours: Any, theirs: Any, least: int) -> None:
    for devices in (1, 2, 3, 4, 8):
        for micro_batches in {least * devices, 2 * devices, 2 * devices + 1, 4 * devices}:
            if least == 2 and micro_batches < 2 * devices:
                continue
            told = SimpleNamespace(
                pp_group_size=devices, num_stages=2 * devices, _num_stages=2 * devices, _n_microbatches=micro_batches
            )
            for device in range(devices):
                expected = list(flat(theirs._calculate_single_rank_operations(told, device)))
                assert ours(device, devices, micro_batches, 0) == expected


def test_later_updates_have_later_ticks() -> None:
    for make in (zb_v, dualpipev):
        plain, later = make(1, 2, 4, 0), make(1, 2, 4, 8)
        assert [(type(i), i.stage, i.tick + 8) for i in plain] == [(type(i), i.stage, i.tick) for i in later]


def test_picture() -> None:
    """That of the module's docstring."""
    letters = {Forward: "F", InputGradient: "B", WeightGradient: "W"}
    assert v_placement(2) == [0, 1, 1, 0]
    for device in (0, 1):
        names = [
            (letters[type(i)] if i.stage < 2 else letters[type(i)].lower()) + str(i.tick) for i in zb_v(device, 2, 4, 0)
        ]
        assert f"    device {device}   {' '.join(names)}\n" in v_shaped.__doc__


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="7 micro-batches are fewer than the 8 stages of 4 devices; use 8 or more"):
        dualpipev(0, 4, 7, 0)
