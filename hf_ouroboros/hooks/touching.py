"""What of a script's code touches the model: asked before it runs where its code tells, and noticed while it runs."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterator
from inspect import CO_VARKEYWORDS
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainerCallback

from ..engine.reads import is_of_script

_LIBRARIES = ("transformers", "torch", "accelerate", __name__.split(".")[0])
_WORDS = frozenset({"model", "trainer", "optimizer", "module", "modules", "net", "network"})
_HOLDERS = (torch.Tensor, nn.Module, torch.optim.Optimizer, Trainer)


def is_foreign(owner: Any, name: str) -> bool:
    """Whether a method, of a callback or a trainer, is a script's own: neither Transformers' nor this package's."""
    method = getattr(owner, name, None)
    return method is not None and not is_of_library(getattr(method, "__func__", method))


def is_of_library(code: Any) -> bool:
    """Whether a function or class is Transformers' or this package's."""
    return (getattr(code, "__module__", None) or "").split(".")[0] in _LIBRARIES


def names_model(callback: TrainerCallback, event: str) -> bool:
    """Whether a callback's method says that it uses the model, the optimizer or the trainer, by its words or what it holds.

    What does not say so may still come by a tensor of the model, which `Watching` notices.
    """
    waiting, seen = [getattr(callback, event)], set()
    while waiting:
        method = waiting.pop()
        function = getattr(method, "__func__", method)
        if not isinstance(function, types.FunctionType):
            return True  # nobody can tell
        if function in seen:
            continue
        seen.add(function)
        words = _words_of(function.__code__)
        if words is None or words & _WORDS:
            return True
        if any(_holds(cell.cell_contents) for cell in function.__closure__ or () if cell != types.CellType()):
            return True
        for word in words:
            value = vars(callback).get(word, function.__globals__.get(word))
            if value is not None and _holds(value):
                return True
            own = getattr(type(callback), word, None)
            if isinstance(own, types.FunctionType) and own.__module__.split(".")[0] not in _LIBRARIES:
                waiting.append(own)
    return False


def speaks_of(function: Any, owner: Any, words: frozenset[str]) -> bool:
    """Whether code of a script, or what it calls of its own, uses one of these names.

    Args:
        function: a function or method.
        owner: whose methods it may call.
        words: names, attributes or strings.
    """
    return any(_all_words_of(code) & words for code in _codes_of(function, owner))


def sets_attributes(function: Any, owner: Any) -> bool:
    """Whether code of a script, or what it calls of its own, sets attributes of anything but `self`; see `speaks_of`."""
    return any(_sets_attributes(code) for code in _codes_of(function, owner))


def _codes_of(function: Any, owner: Any) -> Iterator[types.CodeType]:
    waiting, seen = [function], set()
    while waiting:
        method = waiting.pop()
        code = getattr(getattr(method, "__func__", method), "__code__", None)
        if code is None or code in seen or not is_of_script(method):
            continue
        seen.add(code)
        yield code
        scope = getattr(method, "__globals__", {})
        for word in _all_words_of(code):
            waiting += [found for found in (getattr(type(owner), word, None), scope.get(word)) if found is not None]


@functools.lru_cache(maxsize=512)
def _all_words_of(code: types.CodeType) -> frozenset[str]:
    inner = [_all_words_of(value) for value in code.co_consts if isinstance(value, types.CodeType)]
    return frozenset(code.co_names).union((v for v in code.co_consts if isinstance(v, str)), *inner)


@functools.lru_cache(maxsize=512)
def _sets_attributes(code: types.CodeType) -> bool:
    if "setattr" in code.co_names:
        return True
    before = None
    for instruction in dis.get_instructions(code):
        of_self = before is not None and before.opname.startswith("LOAD_FAST") and before.argval == "self"
        if instruction.opname == "STORE_ATTR" and not of_self:
            return True
        before = instruction
    return any(_sets_attributes(value) for value in code.co_consts if isinstance(value, types.CodeType))


@functools.lru_cache(maxsize=512)
def _words_of(code: types.CodeType) -> frozenset[str] | None:
    """Names, attributes and strings that code uses; None if it uses all its keyword arguments at once."""
    words = set()
    takes_all = code.co_flags & CO_VARKEYWORDS
    keywords = (
        code.co_varnames[code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4)] if takes_all else ""
    )
    for instruction in dis.get_instructions(code):
        for value in instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,):
            if isinstance(value, str):
                words.add(value)
            elif isinstance(value, types.CodeType):
                inner = _words_of(value)
                words |= inner or {keywords}
    return None if keywords and keywords in words else frozenset(words)


def _holds(value: Any) -> bool:
    """Whether something is part of a run, or a container of such."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return any(isinstance(item, _HOLDERS) for item in value)
    return isinstance(value, _HOLDERS)


class Watching(TorchFunctionMode):
    """While it is on, notices whatever this thread does with a tensor.

    Args:
        touched: called before it is done.
        gradient_wanted: called before somebody looks at the gradient of a tensor.
    """

    def __init__(self, touched: Callable[[], None], gradient_wanted: Callable[[], None]):
        self._touched, self._gradient_wanted = touched, gradient_wanted
        self._busy = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._busy and any(True for _ in _tensors((args, kwargs))):
            self._busy = True
            try:
                self._touched()
                if getattr(func, "__self__", None) is torch.Tensor.grad:
                    self._gradient_wanted()
            finally:
                self._busy = False
        return func(*args, **kwargs)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
