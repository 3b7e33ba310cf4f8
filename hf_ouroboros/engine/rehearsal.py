"""The first forward of a compiled stage is rehearsed: it runs as it is, watched, and what it puts out is dropped.

What watches a stage's first forward (`noise.py`, `reads.py`) sees every operation of Python, of which a compiler leaves none, and torch
compiles nothing while it is watched. If the first micro-batch alone ran uncompiled, a resumed run would be another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedOptionError
from ..partition import Stage
from .noise import StageNoise
from .reads import ReadCheck


def rehearse(stage: Stage, noise: StageNoise, reads: ReadCheck, forward: Callable[[], Any]) -> None:
    """Runs a forward to be watched, if the stage is compiled and there was none.

    Args:
        stage: the stage.
        noise: finds out in a first forward what it draws.
        reads: knows whether a script's code is in the stage.
        forward: without the loss, which may do more than compute.

    Raises:
        UnsupportedOptionError: the stage has what is not compiled to the same numbers.
    """
    if not stage.compiles:
        return
    if noise.everything is None:
        with stage.uncompiled():
            forward()
    why = None
    if reads.has_script:
        why = "code of the script (a hook, for instance), which would be compiled with them or left out"
    elif noise.everything:
        why = "random numbers other than dropout, which a compiler draws in an order of its own"
    if why is not None:
        raise UnsupportedOptionError(
            f"torch_compile=True compiles the layers of stage {stage.index}, but there is {why}; leave it off"
        )
