"""Device maps given as a dict: {module name prefix: device}, or the legacy {device: [layer numbers]}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import DeviceMapError
from ..options import shown
from .units import StageSpan, Unit, spans_of_runs


def spans_from_mapping(
    mapping: Mapping[Any, Any], units: Sequence[Unit], devices: Sequence[str], num_stages: int | None
) -> list[StageSpan]:
    """Stages from {module name prefix: device}, the longest prefix winning and "" standing for everything.

    Raises:
        DeviceMapError: unknown names or devices, gaps, a unit on two devices, or another number of stages than `num_stages`.
    """
    names = [name for unit in units for name in unit.modules]
    for key in mapping:
        if key and not any(name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in names):
            raise DeviceMapError(
                f"device_map names the module {shown(key)}, which the model does not have; its parts are "
                f"{', '.join(names[:4])}, ..., {names[-1]}"
            )
    indices = {key: device_index(value, devices, where=f"device_map[{shown(key)}]") for key, value in mapping.items()}
    assigned = []
    for unit in units:
        found = {name: _longest_prefix(name, indices) for name in unit.modules}
        inner = {k: d for k, d in indices.items() for name in unit.modules if k.startswith(f"{name}.")}
        gaps = [name for name, device in found.items() if device is None]
        if gaps and not all(any(key.startswith(f"{name}.") for key in inner) for name in gaps):
            raise DeviceMapError(f"device_map has a gap: it places no device for {gaps[0]!r}")
        targets = {device for device in (*found.values(), *inner.values()) if device is not None}
        if len(targets) > 1:
            raise DeviceMapError(
                f"device_map splits {', '.join(unit.modules)} over {', '.join(devices[d] for d in sorted(targets))}; "
                "they have to stay on one device"
            )
        assigned.append(targets.pop())
    spans = spans_of_runs(assigned)
    if num_stages is not None and num_stages != len(spans):
        raise DeviceMapError(f"device_map makes {len(spans)} stages, but num_stages={num_stages}")
    return spans


def placed_counts(pairs: Sequence[Any], devices: Sequence[str]) -> tuple[list[Any], list[int]]:
    """Layers and device of every stage, from [layers, device] per stage.

    Raises:
        DeviceMapError: no pairs, or unknown devices.
    """
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise DeviceMapError(
            f"device_map has {shown(wrong[0])} as a stage; give [layers, device] for every stage, e.g. [[3, 0], [6, 1], [3, 0]]"
        )
    where = "device_map[{}]"
    return [pair[0] for pair in pairs], [
        device_index(pair[1], devices, where.format(k)) for k, pair in enumerate(pairs)
    ]


def check_module_names(mapping: Mapping[Any, Any], model: nn.Module) -> None:
    """Refuses names, at any depth, that are neither a module nor a parameter of the model."""
    if all(isinstance(value, (list, tuple)) for value in mapping.values()):
        return  # the legacy form has devices as keys
    known = {name for name, _ in model.named_modules()}
    known.update(name for name, _ in model.named_parameters(remove_duplicate=False))
    unknown = [str(name) for name in mapping if name not in known]
    if unknown:
        raise DeviceMapError(
            f"device_map names the module {shown(unknown[0])}, which {type(model).__name__} does not have"
        )


def expand_legacy(mapping: Mapping[Any, Any], units: Sequence[Unit], tied: bool) -> Mapping[Any, Any]:
    """{device: [layer numbers]} of the old `parallelize()` -> {module name: device}."""
    if not mapping or not all(isinstance(value, (list, tuple)) for value in mapping.values()):
        return mapping
    layers = [unit.modules[0] for unit in units if unit.kind == "layer"]
    expanded: dict[str, Any] = {}
    for device, numbers in mapping.items():
        device = int(device) if str(device).isdecimal() else device
        for number in numbers:
            if not isinstance(number, int) or not 0 <= number < len(layers):
                raise DeviceMapError(
                    f"device_map names layer {shown(number)}; the model has layers 0 to {len(layers) - 1}"
                )
            if layers[number] in expanded:
                raise DeviceMapError(f"device_map names layer {number} twice")
            expanded[layers[number]] = device
    missing = [name for name in layers if name not in expanded]
    if missing:
        raise DeviceMapError(f"device_map has a gap: it places no device for {missing[0]!r}")
    for unit in units:
        if unit.kind != "layer":
            on_last = unit.kind == "head" and not (tied and unit is units[-1])
            expanded.update(dict.fromkeys(unit.modules, expanded[layers[-1 if on_last else 0]]))
    return expanded


def device_index(value: Any, devices: Sequence[str], where: str) -> int:
    """Index of a device given by number, name or `torch.device`; offload targets are refused."""
    text = str(value)
    if text in ("disk", "meta") or (text == "cpu" and not devices[0].startswith("cpu")):
        raise DeviceMapError(
            f"{where}={shown(text)}: offloading is not possible while training in a pipeline; every stage lives on one of "
            f"{', '.join(devices)}"
        )
    if text.isdecimal() and len(text) < 10:
        if int(text) < len(devices):
            return int(text)
    else:
        text = text if ":" in text else f"{text}:0"
        if text in devices:
            return list(devices).index(text)
    raise DeviceMapError(f"{where}={shown(value)} is not among the {len(devices)} devices {', '.join(devices)}")


def _longest_prefix(name: str, indices: Mapping[str, int]) -> int | None:
    matches = [key for key in indices if key == "" or name == key or name.startswith(f"{key}.")]
    return indices[max(matches, key=len)] if matches else None
