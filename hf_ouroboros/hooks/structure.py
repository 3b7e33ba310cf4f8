"""Structure: which modules, parameters, hooks and settings a model has, so that changes since it was split are noticed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

_SIMPLE = (int, float, str, bool, type(None))
_NOT_OF_THE_MODEL = (
    "training",
    "hf_device_map",
    "_hf_hook",
    "_old_forward",
    "name_or_path",
    "model_tags",
    "_auto_class",
)
_BOOKKEEPING = (
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "auto_map",
)


@dataclass(frozen=True)
class Structure:
    """A model as it was at some moment.

    Args:
        modules: the modules by name, with their kind.
        parameters: the parameters by name.
        hooks: what is called with a module's forward or backward, by its name.
        settings: attributes that are plain values or functions, by name of module and attribute.
        config: the configuration.
    """

    modules: dict[str, tuple[nn.Module, type]]
    parameters: dict[str, nn.Parameter]
    hooks: dict[str, tuple[Any, ...]]
    settings: dict[tuple[str, str], Any]
    config: Any

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """The structure of a model now."""
        modules = dict(model.named_modules(remove_duplicate=False))
        config = getattr(model, "config", None)
        return cls(
            {name: (module, type(module)) for name, module in modules.items()},
            dict(model.named_parameters(remove_duplicate=False)),
            {name: hooks for name, module in modules.items() if (hooks := _hooks(module))},
            {
                (name, attribute): value
                for name, module in modules.items()
                for attribute, value in vars(module).items()
                if attribute not in _NOT_OF_THE_MODEL and _is_setting(attribute, value)
            },
            _without_bookkeeping(config.to_dict()) if config is not None and hasattr(config, "to_dict") else None,
        )

    def change_since(self, before: Structure) -> str | None:
        """What is another module, parameter or configuration than before, in words; None for nothing."""
        if change := self.change_of_parts_since(before):
            return change
        return "its configuration" if before.config != self.config else None

    def change_of_hooks_since(self, before: Structure) -> str | None:
        """Which module has other hooks than before, in words; None for none."""
        found = _differing(before.hooks, self.hooks, lambda a, b: len(a) == len(b) and all(map(_same, a, b)))
        return (f"hooks {found}" if found == "of the model" else f"hooks of {found}") if found else None

    def change_of_parts_since(self, before: Structure) -> str | None:
        """What is another module or parameter than before, in words; None for nothing."""
        if found := _differing(before.modules, self.modules, _same_module):
            return f"module {found or type(next(iter(self.modules.values()))[0]).__name__}"
        if found := _differing(before.parameters, self.parameters, lambda a, b: a is b):
            return f"parameter {found}"
        return None

    def settings_since(self, before: Structure) -> list[tuple[str, str, Any]]:
        """Settings that are others than before: name of the module, of the attribute, and its value now."""
        missing = object()

        def former(name: str, attribute: str) -> Any:  # what the class says counts where the module said nothing
            return before.settings.get((name, attribute), getattr(self.modules[name][1], attribute, missing))

        return [(*key, value) for key, value in self.settings.items() if not _same(value, former(*key))]


def _without_bookkeeping(config: Any) -> Any:
    """A configuration without what saving and loading write into it."""
    if not isinstance(config, dict):
        return config
    return {key: _without_bookkeeping(value) for key, value in config.items() if key not in _BOOKKEEPING}


def _differing(before: dict[str, Any], now: dict[str, Any], same: Any) -> str | None:
    for name in {**before, **now}:
        if name not in before or name not in now or not same(before[name], now[name]):
            return name or "of the model"
    return None


def _same_module(before: tuple[nn.Module, type], now: tuple[nn.Module, type]) -> bool:
    return before[0] is now[0] and before[1] is now[1]


def _same(before: Any, now: Any) -> bool:
    if callable(now) or callable(before):
        return before is now
    return type(before) is type(now) and (before == now or (before != before and now != now))


def _is_setting(attribute: str, value: Any) -> bool:
    if attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) or "cached" in attribute:
        return False
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, _SIMPLE) for item in value)
    if isinstance(value, dict):
        return bool(value) and all(isinstance(item, _SIMPLE) for item in value.values())
    return isinstance(value, _SIMPLE) or (callable(value) and not isinstance(value, (nn.Module, type)))


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return tuple(
        hook
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and isinstance(hooks, dict) and "state_dict" not in name
        for hook in hooks.values()
    )
