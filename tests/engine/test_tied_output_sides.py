"""The output side's gradients of a tied matrix stay apart, by tick, until the update that applies them closes: it may close anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Case, Run, differences

STAGES = 4


class Counting(dict[int, Any]):
    """A dict that knows how large it has been."""

    most = 0

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, value)
        self.most = max(self.most, len(self))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_any_tick_may_close_the_next_update() -> None:
    """What a run has computed after its first update is right for each way in which it may go on."""
    begun = Run(Case(STAGES, (STAGES,)), "pipelined")
    begun.update(0)
    checkpoint = begun.checkpoint()
    begun.finish()
    for ticks in range(1, STAGES + 1):
        case = Case(STAGES, (STAGES, ticks, 1, STAGES))
        expected = Run(case, "reference").train()
        found = Run(case, "pipelined").resume(checkpoint).train(updates=range(1, len(case.updates)))
        assert differences(expected.model.state_dict(), found.model.state_dict()) == [], ticks
        assert expected.losses[STAGES:] == found.losses, ticks


@pytest.mark.parametrize("micro_batches", [1, 2, STAGES - 1, 2 * (STAGES - 1)])
def test_no_more_are_kept_than_have_to_be(micro_batches: int) -> None:
    """With delays that is one for each of the last K-1 ticks, whatever the updates are."""
    most = {"pipelined": STAGES - 1, "lockstep": STAGES, "1f1b": min(micro_batches, STAGES - 1)}
    for schedule, expected in most.items():
        run = Run(Case(STAGES, (micro_batches,) * (2 + STAGES // micro_batches)), schedule)
        link = next(runner._link for runner in run.engine._runners.values() if runner.borrows)
        link.gradients = Counting()
        run.train()
        assert link.gradients.most == expected, schedule
        assert sorted(link.gradients) == [], schedule  # those of a run that has ended were let go
