"""Random numbers of any kind in a stage: drawn from (seed, stage, tick) alone, or refused by name.

Dropout is found by what it is called (`randomness.py`), which costs little. Everything else that draws (a hook with `torch.rand`,
stochastic depth, noise in a loss) is found where it is computed, which costs something for every operation, so a stage
is watched in its first forward only, and from then on if it draws. Later, the state of torch's own generator tells whether
somebody has begun to draw.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import numpy
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UnsupportedModelError
from .randomness import seeded_dropout

_GENERATORS = (random.Random, numpy.random.RandomState, numpy.random.Generator)
_ADVICE = "which are not tied to a micro-batch; draw with torch"
_SEEDING = ("manual_seed", "seed", "set_rng_state", "fork_rng")
_STATES = ("getstate", "setstate")  # which draw nothing; torch.compile calls them
_SUSPICIONS = 3
_COMPILER = os.path.join("torch", "_dynamo", "convert_frame.py")
_allowed = threading.local()  # .here: whether what this thread draws in a backward is tied to a micro-batch


class StageNoise:
    """How one stage draws.

    Args:
        stage: its index.
        draws: whether it is known to have dropout.
    """

    def __init__(self, stage: int, draws: bool):
        self._stage = stage
        self._draws = draws
        self._everything: bool | None = None  # not known before the first forward
        self._suspected = False
        self._suspicions = _SUSPICIONS

    def look_again(self, draws: bool) -> None:
        """A script may have switched dropout on or off.

        Args:
            draws: whether the stage is known to have dropout now.
        """
        self._draws = draws

    @property
    def everything(self) -> bool | None:
        """Whether more is drawn than dropout; None before the first forward, in which it is found out."""
        return self._everything

    @contextlib.contextmanager
    def scope(self, seed: int, tick: int, device: torch.device) -> Iterator[None]:
        """Surrounds the stage's forward of a tick, or its replay.

        Raises:
            UnsupportedModelError: random numbers are drawn that can't be tied to a tick.
        """
        if self._everything:
            with seeded_dropout(seed, self._stage, tick, device) as generator, _EveryDraw(generator):
                yield
            return
        if self._everything is None or self._suspected:
            with self._watched(seed, tick, device):
                yield
            return
        before = self._states(device)
        with seeded_dropout(seed, self._stage, tick, device) if self._draws else contextlib.nullcontext():
            yield
        if any(not torch.equal(old, new) for old, new in zip(before, self._states(device), strict=True)):
            self._suspected = True  # or another thread has drawn
            self._suspicions -= 1

    def _states(self, device: torch.device) -> list[torch.Tensor]:
        """Of the generators from which nobody may draw in this stage."""
        if not self._suspicions:
            return []
        states = [torch.default_generator.get_state()]
        if device.type != "cpu" and not self._draws:
            states.append(torch.get_device_module(device).get_rng_state(device))
        return states

    @contextlib.contextmanager
    def _watched(self, seed: int, tick: int, device: torch.device) -> Iterator[None]:
        found: list[str] = []
        with (
            seeded_dropout(seed, self._stage, tick, device) as generator,
            _EveryDraw(generator) as draws,
            _calls_noted(found),
        ):
            yield
        if found:
            raise UnsupportedModelError(f"the forward of stage {self._stage} {found[0]}")
        known = draws.drew_as_dropout or draws.drew_on_device  # for which `seeded_dropout` is enough
        drew = draws.drew or (None if self._draws else known)
        if self._suspected and drew:
            raise UnsupportedModelError(
                f"the forward of stage {self._stage} began to draw random numbers in the middle of training "
                f"({drew}); draw them from the first micro-batch on (and multiply by 0), so that they are tied to "
                "micro-batches from then on"
            )
        self._suspected, self._everything = False, bool(draws.drew)
        self._draws |= known is not None


@contextlib.contextmanager
def own_draws(seed: int, stage: int, tick: int, purpose: str, device: torch.device) -> Iterator[None]:
    """Within this context everything is drawn from (seed, stage, tick, purpose) alone."""
    before, _allowed.here = getattr(_allowed, "here", False), True
    try:
        with seeded_dropout(seed, stage, f"{tick}/{purpose}", device) as generator, _EveryDraw(generator):
            yield
    finally:
        _allowed.here = before


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types


class NoDraws(_Watch):
    """Within this context, which surrounds a backward, drawing random numbers is refused."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _draws(func, args, kwargs or {}) and not getattr(_allowed, "here", False):
            raise UnsupportedModelError(
                f"random numbers ({func}) are drawn in a backward, in a hook on gradients for instance, where they are not "
                "tied to a micro-batch; draw them in the forward, or register the hook on the parameter (p.register_hook)"
            )
        return func(*args, **(kwargs or {}))


class _EveryDraw(_Watch):
    """Lets every operation on a CPU that draws use a generator; modes are local to a thread.

    Attributes:
        drew: name of the first operation that drew on its own on the CPU; None if none did.
        drew_on_device: the same of an accelerator, whose generator has been seeded.
        drew_as_dropout: the same of dropout, which has been given the generator.
    """

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator
        self.drew: str | None = None
        self.drew_on_device: str | None = None
        self.drew_as_dropout: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        own = _bound(func, args, kwargs).get("generator")
        # The object is another one on this side of the dispatcher, but nobody else has this seed.
        if own is not None and own.initial_seed() != self.generator.initial_seed():
            raise UnsupportedModelError(
                f"{func} draws from a generator of its own in the forward of a stage, which is neither tied to a micro-batch "
                "nor saved; leave the generator out: it is then drawn from the run's seed, stage by stage"
            )
        if own is not None:
            self.drew_as_dropout = self.drew_as_dropout or str(func)
        elif _device(args, kwargs).type == "cpu":
            self.drew = self.drew or str(func)
            return self._drawn(func, args, kwargs)
        else:
            self.drew_on_device = self.drew_on_device or str(func)
        return func(*args, **kwargs)

    def _drawn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten.native_dropout.default:
            value, p = args[0], args[1]
            mask = torch.empty_like(value, dtype=torch.bool).bernoulli_(1 - p, generator=self.generator)
            return value * mask * (0.0 if p == 1 else 1 / (1 - p)), mask
        given = _bound(func, args, kwargs)
        packet = func.overloadpacket
        for overload in (func, *(getattr(packet, name) for name in packet.overloads())):
            names = _names(overload)
            if "generator" in names and set(given) <= set(names) and _same_types(func, overload, given):
                return overload(**(given | {"generator": self.generator}))
        raise UnsupportedModelError(
            f"{func} draws random numbers in the forward of a stage, and takes no generator to tie them to a micro-batch; "
            "use a function that does, e.g. torch.rand, torch.bernoulli or dropout"
        )


def _names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(_names(func), args, strict=False)) | kwargs


def _same_types(func: Any, overload: Any, given: dict[str, Any]) -> bool:
    kinds = {a.name: str(a.type) for a in overload._schema.arguments}
    return all(str(a.type) == kinds.get(a.name) for a in func._schema.arguments if a.name in given)


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    tagged = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
    if not tagged and not any(a.name == "generator" for a in func._schema.arguments):
        return False
    given = _bound(func, args, kwargs)
    if "generator" in _names(func):
        return not any(t.is_meta for t in args if isinstance(t, torch.Tensor))
    if "dropout_p" in _names(func):  # attention, which is tagged whether it drops or not
        return given.get("dropout_p", 0.0) > 0 and "backward" not in str(func)
    if func is torch.ops.aten.native_dropout.default:
        return args[1] > 0 and args[2] is not False
    return _device(args, kwargs).type != "meta"


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    return next((t.device for t in args if isinstance(t, torch.Tensor)), torch.device("cpu"))


@contextlib.contextmanager
def _calls_noted(found: list[str]) -> Iterator[None]:
    """Notes calls of generators that are not torch's, and what would compute a part of the forward a second time."""

    def note(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            drawn = isinstance(getattr(called, "__self__", None), _GENERATORS)
            if drawn and called.__name__ not in _STATES:
                found.append(f"draws from Python's random numbers ({called.__name__}), {_ADVICE}")
        elif event == "call":
            code = frame.f_code
            if (
                code.co_filename == random.__file__ and code.co_name == "gauss"
            ):  # which has every second number in stock
                found.append(f"draws from Python's random numbers (gauss), {_ADVICE}")
            if code not in known:
                known[code] = _mentions_numpy(frame)
            if known[code]:
                mentions.append(code.co_name)
            if code.co_filename == torch.random.__file__ and code.co_name in _SEEDING and not _by_compiler(frame):
                found.append(
                    f"calls torch.random.{code.co_name}, which all stages share; leave the seed to the trainer"
                )
            if code.co_filename == torch.utils.checkpoint.__file__ and code.co_name == "checkpoint":
                found.append(
                    "uses torch.utils.checkpoint, which recomputes with the weights of now; use recompute=True"
                )

    mentions: list[str] = []  # NumPy's functions don't tell that they are called
    known: dict[CodeType, bool] = {}  # a forward calls few functions many times
    before, state = sys.getprofile(), _numpy_state()
    sys.setprofile(note)
    try:
        yield
    finally:
        if before is None or callable(before):
            sys.setprofile(before)
        else:  # cProfile's, which is an object until Python 3.11
            before.enable()
    if mentions and _numpy_state() != state:
        found.append(f"draws from NumPy's random numbers (in {mentions[0]}), {_ADVICE}")


def _by_compiler(frame: FrameType | None) -> bool:
    """Whether torch.compile is at work, which puts back the states of generators that it finds."""
    while frame is not None:
        if _COMPILER in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _numpy_state() -> bytes:
    """All of it, of whatever kind of generator, with the second of a pair of normal numbers that is kept for the next call."""
    return pickle.dumps(numpy.random.get_state(legacy=False))


def _mentions_numpy(frame: FrameType) -> bool:
    """Whether a function that is called names NumPy's global random numbers."""
    names, scope = frame.f_code.co_names, frame.f_globals
    if "random" in names and any(scope.get(name) is numpy for name in names):
        return True
    values = [scope.get(name) for name in names]
    return any(v is numpy.random or isinstance(getattr(v, "__self__", None), numpy.random.RandomState) for v in values)
