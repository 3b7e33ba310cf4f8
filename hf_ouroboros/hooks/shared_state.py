"""State that a script's code in several stages shares: a hook keeps what a layer has put out, and the loss reads it.

In stock Trainer both are of the same micro-batch. Stages are at different ones, unless each micro-batch is waited for. What code
shares is what it can reach: cells and objects of closures, a method's object, globals, attributes of the trainer.
"""

from __future__ import annotations

import dis
import functools
import types
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import nn
from transformers import Trainer

from ..engine.reads import is_of_script
from ..errors import UnsupportedOptionError
from ..partition import Stage
from ..partition.module_hooks import OURS
from .interfaces import SplitTrainer
from .touching import is_foreign

_WRITING = frozenset({"STORE_ATTR", "STORE_SUBSCR", "STORE_DEREF", "STORE_GLOBAL"})
_WRITERS = frozenset("append appendleft extend add update insert setdefault pop clear copy_ setattr put".split())
_CONTAINERS = (list, dict, set, deque, types.SimpleNamespace, torch.Tensor, numpy.ndarray)
_CONSTANTS = (int, float, complex, str, bytes, bool, type(None), type, types.ModuleType, torch.dtype, torch.device)


def shares_state(stages: Sequence[Stage], trainer: Trainer) -> bool:
    """Whether a script's code in one stage writes something that its code in another one, or its loss, can reach.

    Args:
        stages: all of them, with their hooks.
        trainer: whose loss is the last stage's.
    """
    losses = [trainer.compute_loss_func, trainer.compute_loss if is_foreign(trainer, "compute_loss") else None]
    reached: list[tuple[set[int], bool]] = []
    for k, stage in enumerate(stages):
        code = list(_code_of(stage)) + (losses if k == len(stages) - 1 else [])
        found: dict[int, Any] = {}
        writes = [_reach(each, trainer, found) for each in code if each is not None]
        reached.append((set(found), any(writes)))
    return any(
        mine & others and (i_write or they_write)
        for k, (mine, i_write) in enumerate(reached)
        for others, they_write in reached[:k]
    )


def check_sharing(trainer: SplitTrainer) -> None:
    """Raises UnsupportedOptionError if stages can't share what a script keeps, however long each waits for the others."""
    what = "code of the script in one stage (a hook, for instance) keeps something that its loss, or another stage, can reach"
    if not trainer._processes.alone:
        raise UnsupportedOptionError(
            f"{what}, but each of the {trainer._processes.world_size} processes has an object of its own; start the script as one process "
            "(python script.py), or train with num_stages=1"
        )
    option = trainer.options.engine_settings(1).replayed_by
    if option is not None:
        raise UnsupportedOptionError(f"{what}, which a replay overwrites; train without {option}, or with num_stages=1")


def _code_of(stage: Stage) -> Iterator[Any]:
    core = stage.__dict__.get("_core")
    for part in [*stage.modules(), *([] if core is None else [core])]:
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        yield from (hook for hook in hooks if not hasattr(hook, OURS))
        forward = type(part).forward
        if is_of_script(forward):
            yield forward


def _reach(code: Any, trainer: Trainer, found: dict[int, Any]) -> bool:
    """Collects what code can reach; tells whether it writes anything but its own variables."""
    waiting, seen, writes = [code], set(), False
    while waiting:
        each = waiting.pop()
        if isinstance(each, functools.partial):
            waiting += [each.func, *each.args, *each.keywords.values()]
            continue
        if isinstance(each, types.MethodType):
            waiting += [each.__func__, each.__self__]
            continue
        if not isinstance(each, types.FunctionType):
            if isinstance(each, (*_CONSTANTS, types.BuiltinFunctionType)):
                continue
            found[id(each)] = each
            if callable(each) and not isinstance(each, nn.Module):
                waiting.append(vars(type(each)).get("__call__"))
            continue
        if each in seen or not is_of_script(each):
            continue
        seen.add(each)
        words, stores = _facts_of(each.__code__)
        writes |= stores
        for cell in each.__closure__ or ():
            found[id(cell)] = cell
            if cell != types.CellType():
                waiting.append(cell.cell_contents)
        scope = [each.__globals__[word] for word in words if word in each.__globals__]
        waiting += [value for value in scope if isinstance(value, (*_CONTAINERS, types.FunctionType))]
        waiting += [vars(trainer)[word] for word in words if word in vars(trainer)]
        waiting += each.__defaults__ or ()
    return writes


@functools.lru_cache(maxsize=512)
def _facts_of(code: types.CodeType) -> tuple[frozenset[str], bool]:
    """Names that code uses, and whether it stores into anything but its own variables."""
    words, stores = set(code.co_names), False
    for instruction in dis.get_instructions(code):
        own = instruction.opname == "STORE_DEREF" and instruction.argval in code.co_cellvars
        stores |= instruction.opname in _WRITING and not own
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            inner, inner_stores = _facts_of(value)
            words |= inner
            stores |= inner_stores
    return frozenset(words), stores or bool(words & _WRITERS)
