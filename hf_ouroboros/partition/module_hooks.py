"""Hooks that a script has put on modules: carried over to the stage where they mean what they mean in the model, or refused.

A stage has shadows of modules. Those that are a stage's own share their hooks with the original. A module that holds the
layers of several stages (the model itself, `model.transformer`) runs in every stage, but what it returns is there in one of
them only, and nowhere are its inputs and its gradients all there.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError, UnsupportedOptionError
from .stages import Stage
from .units import StageSpan, Unit

FORWARD = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
OTHERS = {
    "_forward_pre_hooks": "before its forward",
    "_backward_hooks": "on its gradients",
    "_backward_pre_hooks": "on its gradients",
}
OURS = "_refuses_forward"
"""Attribute of the hook with which a process that has only some stages refuses to run the model."""

_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def carry_hooks(
    model: PreTrainedModel, stages: Sequence[Stage], units: Sequence[Unit], spans: Sequence[StageSpan]
) -> None:
    """Lets stages call the hooks that are on the model now; those that come later to the same modules, too.

    Args:
        model: the model.
        stages: all of its stages.
        units: all of its units.
        spans: which of them are whose.

    Raises:
        UnsupportedOptionError: a hook is on all modules there are.
        UnsupportedModelError: a hook would mean something else in stages.
    """
    for name in _GLOBAL:
        if getattr(torch_module, name):
            raise UnsupportedOptionError(
                "a hook is registered on all modules (torch.nn.modules.module.register_module_...), which would see modules "
                "of stages, and stand-ins, several of them at once; register it on the modules that it is for"
            )
    containers = _containers(units)
    for name, last in containers.items():
        original = model.get_submodule(name)
        shadows = [_shadow_of(stage, name) for stage in stages]
        if len(stages) == 1:
            if shadows[0] is not None:
                _share(original, shadows[0])
            elif _has_any(original):
                raise _refusal(model, name, "")
            continue
        for attribute, when in OTHERS.items():
            if any(not hasattr(hook, OURS) for hook in getattr(original, attribute).values()):
                raise _refusal(model, name, when)
        completing = next(k for k, span in enumerate(spans) if span.start <= last < span.stop)
        complete = shadows[completing] is not None and stages[completing].completes(last)
        if original._forward_hooks and not complete:
            raise _refusal(model, name, "after its forward")
        for k, twin in enumerate(shadows):
            if twin is not None:
                _silence(twin)
                if k == completing and complete:
                    for attribute in FORWARD:
                        twin.__dict__[attribute] = original.__dict__[attribute]
    for stage in stages:
        for name, part in stage.named_modules():
            if part._backward_hooks and name:
                part._is_full_backward_hook = model.get_submodule(name)._is_full_backward_hook


def _containers(units: Sequence[Unit]) -> dict[str, int]:
    """Modules that hold units, by name, and the last unit that each holds."""
    found: dict[str, int] = {}
    for index, unit in enumerate(units):
        for name in unit.modules:
            parts = name.split(".")[:-1]
            found |= {".".join(parts[:length]): index for length in range(len(parts) + 1)}
    return found


def _shadow_of(stage: Stage, name: str) -> nn.Module | None:
    core = stage.__dict__.get("_core")
    return None if core is None else core.get_submodule(name)


def _share(original: nn.Module, twin: nn.Module) -> None:
    for attribute in _hook_names(original):
        if not any(hasattr(hook, OURS) for hook in original.__dict__[attribute].values()):
            twin.__dict__[attribute] = original.__dict__[attribute]
    twin._is_full_backward_hook = original._is_full_backward_hook


def _silence(twin: nn.Module) -> None:
    for attribute in _hook_names(twin):
        twin.__dict__[attribute] = type(twin.__dict__[attribute])()


def _hook_names(module: nn.Module) -> list[str]:
    kinds = (*FORWARD, *OTHERS, "_forward_pre_hooks_with_kwargs")
    return [name for name in kinds if name in module.__dict__]


def _has_any(module: nn.Module) -> bool:
    return any(module.__dict__[name] for name in _hook_names(module))


def _refusal(model: PreTrainedModel, name: str, when: str) -> UnsupportedModelError:
    where = f"{name} of this {type(model).__name__}" if name else f"the {type(model).__name__} itself"
    return UnsupportedModelError(
        f"a hook {when} is registered on {where}, whose layers are in several stages: no stage has all that it would see; "
        "register it on a layer or on another module inside, or train with num_stages=1"
    )
