"""What draws from generators that are not torch's in a forward: noticed whatever kind they are, and whatever they have kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch

from hf_ouroboros.engine.noise import StageNoise
from hf_ouroboros.errors import UnsupportedModelError


@pytest.fixture(params=[numpy.random.MT19937, numpy.random.PCG64])
def generator(request: pytest.FixtureRequest) -> Iterator[type]:
    before = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(request.param(0))
    yield request.param
    numpy.random.set_bit_generator(before)


def first_forward(call: Callable[[], Any]) -> None:
    with StageNoise(0, False).scope(0, 0, torch.device("cpu")):
        call()


def normal() -> float:
    return float(numpy.random.randn())


def named() -> str:
    return numpy.random.__name__


def test_what_is_only_named_is_no_draw(generator: type) -> None:
    first_forward(named)


@pytest.mark.parametrize("before", [0, 1])
def test_draws_from_numpy_are_refused(generator: type, before: int) -> None:
    """Normal numbers are made in pairs: the second one leaves the bits where they are."""
    for _ in range(before):
        normal()
    with pytest.raises(UnsupportedModelError, match=r"draws from NumPy's random numbers \(in normal\)"):
        first_forward(normal)


@pytest.mark.parametrize("before", [0, 1])
def test_draws_from_python_are_refused(before: int) -> None:
    """As NumPy's, normal numbers are made in pairs."""
    own = random.Random(0)
    for _ in range(before):
        own.gauss(0.0, 1.0)
    with pytest.raises(UnsupportedModelError, match="draws from Python's random numbers"):
        first_forward(lambda: own.gauss(0.0, 1.0))
