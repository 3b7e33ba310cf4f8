"""Changes of a model's configuration as a user writes them, `n_layer=6,cutoffs=[20,400]`, and bounds of what it may ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError, UnsupportedOptionError
from ..options import shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_LAYERS = 1024
MOST = 2**31 - 1  # of any other number: none of a model's sizes is larger
MOST_VALUES = 4096  # in a list
_COUNTS_MODULES = re.compile(
    r"(?!.*(size|dim|per_layer))(.*)(layer|expert|block|depth|stage)"
)  # what a model has many of


def read_overrides(text: str, config: PretrainedConfig, option: str = "--config_overrides") -> dict[str, Any]:
    """The changes, each of the type that the configuration has; where it has None, any number, word or list of them.

    Args:
        text: name=value, joined by commas.
        config: that is to be changed; stays as it is.
        option: by which messages call the text.

    Raises:
        UnsupportedOptionError: not of the form name=value, an unknown name, or a value of another type.
    """
    import yaml

    values: dict[str, Any] = {}
    known = config.to_dict()
    for item in filter(
        None, (part.strip() for part in re.split(r",(?![^\[{]*[\]}])", text))
    ):  # but not inside of a list or mapping
        name, equals, written = (part.strip() for part in item.partition("="))
        if not equals or not written:
            raise UnsupportedOptionError(f"{option}: {shown(item)} is not of the form name=value")
        name = getattr(config, "attribute_map", {}).get(name, name)
        if name not in known:
            raise UnsupportedOptionError(
                f"{option}: {shown(item)} is not of the form name=value with a name that a {config.model_type} "
                f"configuration has; it has no option {shown(name)}"
            )
        try:
            value = yaml.safe_load(written)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UnsupportedOptionError(f"{option}: {shown(item)} can't be read ({type(error).__name__})") from error
        present = getattr(config, name)
        if isinstance(present, float) and isinstance(value, int | str) and not isinstance(value, bool):
            try:
                value = float(value)  # YAML takes 1e-5 for a string
            except (ValueError, OverflowError):
                pass
        if present is not None and type(value) is not type(present):
            raise UnsupportedOptionError(f"{option}: {name} must be {type(present).__name__}, got {shown(written)}")
        if not _is_simple(value):
            raise UnsupportedOptionError(
                f"{option}: {name} must be a number, a word or a list or mapping of up to {MOST_VALUES} of them, got {shown(written)}"
            )
        values[name] = value
    return values


def _is_simple(value: Any) -> bool:
    if isinstance(value, dict):
        return len(value) <= MOST_VALUES and all(isinstance(k, str) and _is_simple(v) for k, v in value.items())
    if isinstance(value, list):
        return len(value) <= MOST_VALUES and all(not isinstance(v, list | dict) and _is_simple(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def check_sizes(config: PretrainedConfig) -> None:
    """Refuses a configuration that no model has, before anything is built by it: that might not come to an end.

    Raises:
        UnsupportedModelError: names the number.
    """
    for name, value in _numbers(config.to_dict()):
        most = MOST_LAYERS if _COUNTS_MODULES.match(name.rpartition(".")[2]) else MOST
        if abs(value) > most:
            raise UnsupportedModelError(
                f"the configuration's {name}={shown(value)} is more than {most:,}, which is no model that can be planned"
            )


def _numbers(values: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, int | float]]:
    if depth > 20:
        raise UnsupportedModelError(f"the configuration is nested too deeply at {shown(name)}")
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _numbers(value, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _numbers(value, name, depth + 1)
    elif isinstance(values, int) and not isinstance(values, bool):
        yield name, values
