"""zero_bubble: a backward in two parts, to the last bit what one backward gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Case, Run, assert_same_run
from torch import nn

from hf_ouroboros.engine.divided import DividedBackward
from hf_ouroboros.errors import UnsupportedModelError

CASES = {
    "tied": Case(3, updates=(2, 4, 1, 3), dropout=0.1, padded=True, clip=0.5),
    "untied": Case(3, updates=(4, 4, 2), tied=False, dropout=0.1),
    "two stages": Case(2, updates=(3, 1, 3), tied=False, clip=0.3, scope="global"),
    "four stages, few ticks": Case(4, updates=(2, 2, 1), dropout=0.1),
    "four stages, many ticks": Case(4, updates=(9, 4), tied=False),
    "several stages per device": Case(4, updates=(4, 3), tied=False, devices=2),
    "tied on two devices": Case(5, updates=(6, 2), devices=2, dropout=0.1),
    "one stage": Case(1, updates=(2, 2)),
    "recompute": Case(3, updates=(4, 2), dropout=0.1, recompute=True),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_1f1b_and_the_reference(name: str) -> None:
    case = CASES[name]
    found = Run(case, "zero_bubble").train()
    assert_same_run(Run(case, "1f1b").train(), found)
    assert_same_run(Run(case, "reference 1f1b").train(), found)
