"""Device map -> stages: which run of the model's units each stage holds, and which device runs it.

A *unit* is the smallest thing that can be placed: the embeddings together, each layer, the final norm, the head.
A stage is a contiguous run of units in execution order. A device may hold the first and the last stage: the
snake bites its tail, which is what tied embeddings need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import convert_file_size_to_int

from ..errors import DeviceMapError
from .balance import balanced_counts

PRESETS = ("auto", "balanced", "sequential")


@dataclass(frozen=True)
class Unit:
    """The smallest placeable part of a model.

    Args:
        modules: full names of its modules; they always stay together.
        kind: "embedding", "layer" or "head".
        cost: relative compute time of forward plus backward.
        parameter_bytes: bytes of its parameters, a tied matrix counted at the embedding only.
    """

    modules: tuple[str, ...]
    kind: str
    cost: float = 1.0
    parameter_bytes: int = 0


@dataclass(frozen=True)
class StageSpan:
    """Stage `index` holds `units[start:stop]` and runs on `devices[device]`."""

    index: int
    start: int
    stop: int
    device: int


def default_num_stages(num_devices: int, tied: bool) -> int:
    """K when the user names none: one more than devices where the head shares the embedding's device."""
    return num_devices + 1 if tied and num_devices > 1 else num_devices


def default_placement(num_stages: int, num_devices: int, tied: bool) -> list[int]:
    """The device of every stage: in order, the last stage back on device 0 where it has to be or may be."""
    if num_stages == 1:
        return [0]
    if not tied and num_devices >= num_stages:
        return list(range(num_stages))
    used = min(num_devices, num_stages - 1)
    return [k * used // (num_stages - 1) for k in range(num_stages - 1)] + [0]


def parse_device_map(device_map: Any) -> Any:
    """Turns the command line's JSON into a dict or list; leaves presets, dicts and lists as they are."""
    if not isinstance(device_map, str) or device_map in PRESETS:
        return device_map
    text = device_map.strip()
    if text[:1] in "{[" and text:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise DeviceMapError(f"device_map is not valid JSON ({error}): {device_map!r}") from error
    raise DeviceMapError(
        f"device_map={device_map!r} is unknown; use one of {', '.join(PRESETS)}, a dict of module name prefixes "
        "to devices, or a list of layer counts per stage"
    )


def plan_stages(
    device_map: Any,
    units: Sequence[Unit],
    devices: Sequence[str],
    tied: bool,
    num_stages: int | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
) -> list[StageSpan]:
    """Turns any accepted device map into stages.

    Args:
        device_map: "auto", "balanced", "sequential", {module name prefix: device}, the legacy
            {device: [layer numbers]}, or a list of layer counts per stage.
        units: the model's units in execution order.
        devices: device names, e.g. ["cuda:0", "cuda:1"] or ["cpu:0", "cpu:1"].
        tied: whether input and output embeddings are one matrix.
        num_stages: K; None derives it from the devices or the map.
        max_memory: {device index or name: bytes or "10GB"} for parameters, as in accelerate.

    Raises:
        DeviceMapError: the map has unknown names, gaps, non-contiguous stages, offload targets, more stages
            than layers, tied embeddings on two devices, or does not fit into max_memory.
    """
    device_map = parse_device_map(device_map)
    if isinstance(device_map, Mapping):
        spans = _from_mapping(_expand_legacy(device_map, units, tied), units, devices, num_stages)
    elif isinstance(device_map, (list, tuple)):
        spans = _from_counts(list(device_map), units, devices, tied, num_stages)
    else:
        budgets = parse_max_memory(max_memory, devices)
        if device_map == "sequential":
            spans = _sequential(units, devices, tied, budgets)
        else:
            spans = _balanced(units, devices, tied, num_stages)
    if tied and spans[0].device != spans[-1].device:
        raise DeviceMapError(
            f"the embeddings are tied, but the device map puts the input side on {devices[spans[0].device]} and the "
            f"output side on {devices[spans[-1].device]}; put first and last stage on one device, or untie them "
            "(config.tie_word_embeddings=False)"
        )
    _check_memory(spans, units, devices, parse_max_memory(max_memory, devices))
    return spans


def parse_max_memory(max_memory: Mapping[Any, int | str] | None, devices: Sequence[str]) -> dict[int, int]:
    """{device index: bytes} from accelerate's notation; unknown devices are refused."""
    budgets = {}
    for key, value in (max_memory or {}).items():
        index = _device_index(key, devices, where="max_memory")
        try:
            budgets[index] = convert_file_size_to_int(value)
        except ValueError as error:
            raise DeviceMapError(f"max_memory[{key!r}]={value!r} is not a size such as 2000000 or '10GB'") from error
    return budgets


def _layers(units: Sequence[Unit]) -> int:
    return sum(unit.kind == "layer" for unit in units)


def _balanced(units: Sequence[Unit], devices: Sequence[str], tied: bool, num_stages: int | None) -> list[StageSpan]:
    layers = _layers(units)
    if num_stages is None:
        num_stages = min(default_num_stages(len(devices), tied), layers + 1)
    elif num_stages > layers:
        raise DeviceMapError(
            f"num_stages={num_stages} is more than the model's {layers} layers; use at most {layers}, or name the "
            "split yourself with a device_map"
        )
    placement = default_placement(num_stages, len(devices), tied)
    first = next(i for i, unit in enumerate(units) if unit.kind == "layer")
    costs = [unit.cost for unit in units]
    counts = balanced_counts(
        costs[first : first + layers],
        placement,
        head_cost=sum(costs[first + layers :]),
        embedding_cost=sum(costs[:first]),
    )
    return _spans_from_counts(counts, units, placement)


def _from_counts(
    counts: list[Any], units: Sequence[Unit], devices: Sequence[str], tied: bool, num_stages: int | None
) -> list[StageSpan]:
    layers = _layers(units)
    if not counts or any(isinstance(c, bool) or not isinstance(c, int) or c < 0 for c in counts):
        raise DeviceMapError(f"device_map={counts!r} must be a list of layer counts per stage, e.g. [3, 6, 3]")
    if 0 in counts[1:-1]:
        raise DeviceMapError(f"device_map={counts!r} has a stage without layers; only first and last may have none")
    if sum(counts) != layers:
        raise DeviceMapError(f"device_map={counts!r} adds up to {sum(counts)} layers, but the model has {layers}")
    if num_stages is not None and num_stages != len(counts):
        raise DeviceMapError(f"device_map={counts!r} has {len(counts)} stages, but num_stages={num_stages}")
    return _spans_from_counts(counts, units, default_placement(len(counts), len(devices), tied))


def _spans_from_counts(counts: Sequence[int], units: Sequence[Unit], placement: Sequence[int]) -> list[StageSpan]:
    position = next(i for i, unit in enumerate(units) if unit.kind == "layer")
    spans = []
    for k, count in enumerate(counts):
        start = 0 if k == 0 else position
        position += count
        stop = len(units) if k == len(counts) - 1 else position
        spans.append(StageSpan(k, start, stop, placement[k]))
    return spans


def _sequential(units: Sequence[Unit], devices: Sequence[str], tied: bool, budgets: dict[int, int]) -> list[StageSpan]:
    missing = [devices[i] for i in range(len(devices)) if i not in budgets]
    if missing:
        raise DeviceMapError(
            f"device_map='sequential' fills one device after the other and needs max_memory for each; missing: "
            f"{', '.join(missing)}"
        )
    left, device, assigned = dict(budgets), 0, []
    for unit in units:
        if tied and unit.modules == units[-1].modules:
            device = 0
        while left[device] < unit.parameter_bytes:
            device += 1
            if device == len(devices):
                raise DeviceMapError(
                    f"max_memory is too small: {unit.modules[0]} ({unit.parameter_bytes} bytes) finds no room on "
                    f"{', '.join(devices)}; parameters are never offloaded here. Add devices or memory"
                )
        left[device] -= unit.parameter_bytes
        assigned.append(device)
    return _runs(assigned)


def _from_mapping(
    mapping: Mapping[Any, Any], units: Sequence[Unit], devices: Sequence[str], num_stages: int | None
) -> list[StageSpan]:
    names = [name for unit in units for name in unit.modules]
    for key in mapping:
        if key and not any(name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in names):
            raise DeviceMapError(
                f"device_map names the module {key!r}, which the model does not have; its parts are "
                f"{', '.join(names[:4])}, ..., {names[-1]}"
            )
    indices = {key: _device_index(value, devices, where=f"device_map[{key!r}]") for key, value in mapping.items()}
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
    spans = _runs(assigned)
    if num_stages is not None and num_stages != len(spans):
        raise DeviceMapError(f"device_map makes {len(spans)} stages, but num_stages={num_stages}")
    seen: dict[int, int] = {}
    for span in spans:
        earlier = seen.setdefault(span.device, span.index)
        snake = earlier == 0 and span.index == len(spans) - 1
        if earlier != span.index and not snake and num_stages is None:
            raise DeviceMapError(
                f"device_map is not contiguous: {devices[span.device]} gets stage {earlier} and again stage "
                f"{span.index} ({units[span.start].modules[0]}, ...). Only the first and the last stage share a device; "
                f"if you mean {len(spans)} interleaved stages, say num_stages={len(spans)}"
            )
    return spans


def _runs(assigned: Sequence[int]) -> list[StageSpan]:
    bounds = [0] + [i for i in range(1, len(assigned)) if assigned[i] != assigned[i - 1]] + [len(assigned)]
    return [StageSpan(k, a, b, assigned[a]) for k, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]


def _longest_prefix(name: str, indices: Mapping[str, int]) -> int | None:
    matches = [key for key in indices if key == "" or name == key or name.startswith(f"{key}.")]
    return indices[max(matches, key=len)] if matches else None


def _expand_legacy(mapping: Mapping[Any, Any], units: Sequence[Unit], tied: bool) -> Mapping[Any, Any]:
    """{device: [layer numbers]} of the old `parallelize()` -> {module name: device}."""
    if not mapping or not all(isinstance(value, (list, tuple)) for value in mapping.values()):
        return mapping
    layers = [unit.modules[0] for unit in units if unit.kind == "layer"]
    expanded: dict[str, Any] = {}
    for device, numbers in mapping.items():
        device = int(device) if str(device).isdigit() else device
        for number in numbers:
            if not isinstance(number, int) or not 0 <= number < len(layers):
                raise DeviceMapError(f"device_map names layer {number!r}; the model has layers 0 to {len(layers) - 1}")
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


def _device_index(value: Any, devices: Sequence[str], where: str) -> int:
    text = str(value)
    if text in ("disk", "meta") or (text == "cpu" and not devices[0].startswith("cpu")):
        raise DeviceMapError(
            f"{where}={text!r}: offloading is not possible while training in a pipeline; every stage lives on one of "
            f"{', '.join(devices)}"
        )
    if text.isdigit():
        if int(text) < len(devices):
            return int(text)
    else:
        text = text if ":" in text else f"{text}:0"
        if text in devices:
            return list(devices).index(text)
    raise DeviceMapError(f"{where}={value!r} is not among the {len(devices)} devices {', '.join(devices)}")


def _check_memory(
    spans: Sequence[StageSpan], units: Sequence[Unit], devices: Sequence[str], budgets: dict[int, int]
) -> None:
    for device, budget in budgets.items():
        need = sum(u.parameter_bytes for s in spans if s.device == device for u in units[s.start : s.stop])
        if need > budget:
            raise DeviceMapError(
                f"the parameters on {devices[device]} take {need} bytes, more than max_memory allows ({budget}); "
                "add devices, raise max_memory, or name a split with device_map"
            )
