"""What a model was when it was split: stages are copies of its module tree, which later changes would not reach."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import EngineError

CONTENT = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


class Structure:
    """The modules of a model, and which adapters are active in them.

    Args:
        model: just split.
    """

    def __init__(self, model: nn.Module):
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._adapters = _adapters(self._modules)

    def changed(self, model: nn.Module, fixed: bool) -> bool:
        """Whether the model is another than it was.

        Args:
            model: the same one.
            fixed: whether it may not be.

        Raises:
            EngineError: it is, but may not be; says what is changed.
        """
        change = self._change(model)
        if change is not None and fixed:
            raise EngineError(
                f"the model was changed after it was split: {change}; make changes, and choose the active adapter, before the "
                "trainer is created"
            )
        return change is not None

    def _change(self, model: nn.Module) -> str | None:
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in modules.keys() | self._modules.keys():
            if modules.get(name) is not self._modules.get(name):
                kind = "added" if name not in self._modules else "removed" if name not in modules else "replaced"
                return f"the module {name} was {kind}"
        for name, found in _adapters(modules).items():
            for key, value in found.items():
                if self._adapters[name].get(key) != value:
                    return f"{key.strip('_')} of {name} is {value!r} and was {self._adapters[name].get(key)!r}"
        return None


def _adapters(modules: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
    return {
        name: {key: _copied(getattr(module, key)) for key in CONTENT if hasattr(module, key)}
        for name, module in modules.items()
        if hasattr(type(module), "adapter_layer_names")
    }


def _copied(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return list(value)
    return dict(value) if isinstance(value, dict) else value
