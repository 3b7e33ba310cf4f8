"""Device map -> stages: which run of the model's units each stage holds, and which device runs it.

A stage is a contiguous run of units in execution order. A device may hold several stages: the first and the last one, where the snake
bites its tail, which is what tied embeddings need, and any others that a map puts there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import convert_file_size_to_int

from ..errors import DeviceMapError, InputFileError
from ..options import from_json, shown
from ..user_files import read_text
from .balance import Load, NoSplitError, best_counts
from .mapping import device_index, expand_legacy, placed_counts, spans_from_mapping
from .mixed_choice import Row, choose_mixed, least_full
from .units import StageSpan, Unit, count_layers, spans_of_runs

MOST_BYTES = 2**26  # of a file with a device map
PRESETS = ("auto", "balanced", "sequential", "mixed")


@dataclass(frozen=True)
class Planned:
    """Stages, and why they are as they are.

    Args:
        spans: what each stage holds, and where.
        reason: what was weighed; empty where a map says it all.
    """

    spans: list[StageSpan]
    reason: str = ""


def default_num_stages(num_devices: int, tied: bool) -> int:
    """K when the user names none: one more than devices where the head shares the embedding's device."""
    return num_devices + 1 if tied and num_devices > 1 else num_devices


def default_placement(num_stages: int, num_devices: int, tied: bool) -> list[int]:
    """The device of every stage: in order, the last stage back on device 0 where it has to be or may be.

    With more stages than that there and back again, as a V, however often: so work reaches every device early in an update, and
    device 0 has both ends.
    """
    if num_stages == 1:
        return [0]
    if not tied and num_devices >= num_stages:
        return list(range(num_stages))
    there = list(range(min(num_devices, num_stages - 1)))
    cycle = there if num_stages == len(there) + 1 else [*there, *reversed(there)]
    placement = [cycle[k % len(cycle)] for k in range(num_stages)]
    return [*placement[:-1], 0] if tied else placement


def parse_device_map(device_map: Any) -> Any:
    """Turns JSON, or a file with JSON, into a dict or list; leaves presets, dicts and lists as they are."""
    if isinstance(device_map, (Mapping, list, tuple)) or device_map in PRESETS:
        return device_map
    if not isinstance(device_map, str):
        raise DeviceMapError(f"device_map={shown(device_map)} must be a string, a dict or a list")
    text = device_map.strip()
    if text.endswith(".json"):
        try:
            text = read_text(text, MOST_BYTES).strip()
        except InputFileError as error:
            raise DeviceMapError(f"device_map: {error}; `hf-ouroboros plan` writes such a file") from error
    if text[:1] in "{[" and text:
        try:
            return from_json(text)
        except ValueError as error:
            raise DeviceMapError(f"device_map is not valid JSON ({error}): {shown(device_map)}") from error
    raise DeviceMapError(
        f"device_map={shown(device_map)} is unknown; use one of {', '.join(PRESETS)}, a dict of module name prefixes "
        "to devices, a list of layer counts (or of [layers, device]) per stage, or a .json file with one of these"
    )


def plan_stages(
    device_map: Any,
    units: Sequence[Unit],
    devices: Sequence[str],
    tied: bool,
    num_stages: int | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
) -> list[StageSpan]:
    """The stages of any accepted device map; see `planned_stages`."""
    return planned_stages(device_map, units, devices, tied, num_stages, max_memory).spans


def planned_stages(
    device_map: Any,
    units: Sequence[Unit],
    devices: Sequence[str],
    tied: bool,
    num_stages: int | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
) -> Planned:
    """Turns any accepted device map into stages.

    Args:
        device_map: "auto", "balanced", "sequential", "mixed", {module name prefix: device}, the legacy
            {device: [layer numbers]}, a list of layer counts or of [layers, device] per stage, or a .json file with one of these.
        units: the model's units in execution order.
        devices: device names, e.g. ["cuda:0", "cuda:1"] or ["cpu:0", "cpu:1"].
        tied: whether input and output embeddings are one matrix.
        num_stages: K; None derives it from the devices or the map.
        max_memory: {device index or name: bytes or "10GB"} for parameters, as in accelerate.

    Raises:
        DeviceMapError: the map has unknown names, gaps, offload targets, more stages than layers, tied embeddings on two
            devices, or does not fit into max_memory.
    """
    reason = ""
    device_map = parse_device_map(device_map)
    if isinstance(device_map, Mapping):
        spans = spans_from_mapping(expand_legacy(device_map, units, tied), units, devices, num_stages)
    elif isinstance(device_map, (list, tuple)):
        spans = _from_counts(list(device_map), units, devices, tied, num_stages)
    else:
        budgets = parse_max_memory(max_memory, devices)
        if device_map == "mixed":
            spans, reason = _mixed(units, devices, tied, num_stages, budgets)
        elif device_map == "sequential":
            spans = _sequential(units, devices, tied, budgets)
            if num_stages not in (None, len(spans)):
                raise DeviceMapError(
                    f"device_map='sequential' makes {len(spans)} stages, but num_stages={num_stages}; leave it out"
                )
        else:
            spans = _balanced(units, devices, tied, num_stages, budgets)
    if tied and spans[0].device != spans[-1].device:
        raise DeviceMapError(
            f"the embeddings are tied, but the device map puts the input side on {devices[spans[0].device]} and the "
            f"output side on {devices[spans[-1].device]}; put first and last stage on one device, or untie them "
            "(config.tie_word_embeddings=False)"
        )
    _check_memory(spans, units, devices, parse_max_memory(max_memory, devices))
    return Planned(spans, reason)


def parse_max_memory(max_memory: Mapping[Any, int | str] | None, devices: Sequence[str]) -> dict[int, int]:
    """{device index: bytes} from accelerate's notation; unknown devices are refused."""
    budgets = {}
    for key, value in (max_memory or {}).items():
        index = device_index(key, devices, where="max_memory")
        try:
            budgets[index] = convert_file_size_to_int(value)
        except (ValueError, AttributeError, TypeError, OverflowError) as error:  # what accelerate makes of other types
            raise DeviceMapError(
                f"max_memory[{shown(key)}]={shown(value)} is not a size such as 2000000 or '10GB'"
            ) from error
    return budgets


def _balanced(
    units: Sequence[Unit], devices: Sequence[str], tied: bool, num_stages: int | None, budgets: Mapping[int, int]
) -> list[StageSpan]:
    layers = count_layers(units)
    if num_stages is None:
        num_stages = min(default_num_stages(len(devices), tied), layers + 1)
    elif num_stages > layers:
        raise DeviceMapError(
            f"num_stages={num_stages} is more than the model's {layers} layers; use at most {layers}, or name the "
            "split yourself with a device_map"
        )
    placement = default_placement(num_stages, len(devices), tied)
    time = _load(units, num_stages, [unit.cost for unit in units])
    memory = _load(units, num_stages, [unit.parameter_bytes for unit in units])
    limits = [budgets.get(i, math.inf) for i in range(len(devices))]
    try:
        counts = best_counts(placement, time, memory, limits)
    except NoSplitError:
        raise DeviceMapError(_too_small(units, devices, placement, memory, limits)) from None
    return _spans_from_counts(counts, units, placement)


def _mixed(
    units: Sequence[Unit], devices: Sequence[str], tied: bool, num_stages: int | None, budgets: Mapping[int, int]
) -> tuple[list[StageSpan], str]:
    layers, count = count_layers(units), len(devices)
    least, most = (3 if tied else 2, layers + 2) if count > 1 else (1, 1)
    odd = tied and count == 2
    if num_stages not in (None, 1) and (not least <= num_stages <= most or (odd and num_stages % 2 == 0)):
        raise DeviceMapError(
            f"num_stages={num_stages} does not go with device_map='mixed': neighbouring stages are on different devices, so this "
            f"model{' with tied embeddings' if tied else ''} has {'an odd number from ' if odd else ''}{least} to {most} stages on "
            f"{count} device{'s' if count > 1 else ''}, or 1; leave it out to have the number chosen"
        )
    fewest = min(default_num_stages(count, tied), layers + 1) if num_stages != 1 else 1
    placement = default_placement(fewest, count, tied)
    time, memory = _load(units, 2, [u.cost for u in units]), _load(units, 2, [u.parameter_bytes for u in units])
    row = Row(
        time.layers[0], memory.layers[0], (time.fixed[0], time.fixed[1]), (memory.fixed[0], memory.fixed[1]), tied
    )
    limits = [budgets.get(i, math.inf) for i in range(count)]
    try:
        split, reason = choose_mixed(row, placement, count, limits, num_stages)
    except NoSplitError:
        needs = least_full(row, count, limits, num_stages)
        if not needs:
            raise DeviceMapError(
                f"no split into num_stages={num_stages} was found with device_map='mixed'; leave it out to have the number chosen"
            ) from None
        raise DeviceMapError(_too_full(needs, devices, limits, num_stages)) from None
    return _spans_from_counts(split.counts, units, split.placement), reason


def _too_small(
    units: Sequence[Unit], devices: Sequence[str], placement: Sequence[int], memory: Load, limits: Sequence[float]
) -> str:
    """Names the device that is too full even under the split that fills the devices least."""
    shares = [1 / max(limits[d], 1) for d in placement]
    filled = Load(
        [[size * share for size in row] for row, share in zip(memory.layers, shares, strict=True)],
        [size * share for size, share in zip(memory.fixed, shares, strict=True)],
    )
    spans = _spans_from_counts(best_counts(placement, filled), units, placement)
    needs = {
        d: sum(u.parameter_bytes for s in spans if s.device == d for u in units[s.start : s.stop]) for d in placement
    }
    return _too_full(needs, devices, limits, len(placement))


def _too_full(
    needs: Mapping[int, float], devices: Sequence[str], limits: Sequence[float], num_stages: int | None
) -> str:
    tight = max(needs, key=lambda d: needs[d] / max(limits[d], 1))
    stages = "stages" if num_stages is None else f"{num_stages} stages"
    return (
        f"max_memory is too small for {stages} on {', '.join(devices)}: even the split that fills them least "
        f"puts {needs[tight]:.0f} bytes of parameters on {devices[tight]}, where {limits[tight]} are allowed; raise max_memory "
        "or add devices (`hf-ouroboros plan` counts activations and optimizer state, too)"
    )


def _load(units: Sequence[Unit], num_stages: int, values: Sequence[float]) -> Load:
    """The same in every stage; what precedes the layers in the first one, what follows them in the last one."""
    layers = [value for unit, value in zip(units, values, strict=True) if unit.kind == "layer"]
    first = next(i for i, unit in enumerate(units) if unit.kind == "layer")
    fixed = [0.0] * num_stages
    fixed[0] += sum(values[:first])
    fixed[-1] += sum(values[first + len(layers) :])
    return Load([layers] * num_stages, fixed)


def _from_counts(
    counts: list[Any], units: Sequence[Unit], devices: Sequence[str], tied: bool, num_stages: int | None
) -> list[StageSpan]:
    layers = count_layers(units)
    if counts and all(isinstance(pair, (list, tuple)) for pair in counts):
        counts, placement = placed_counts(counts, devices)
    else:
        placement = default_placement(len(counts), len(devices), tied)
    if not counts or any(isinstance(c, bool) or not isinstance(c, int) or c < 0 for c in counts):
        raise DeviceMapError(f"device_map={shown(counts)} must be a list of layer counts per stage, e.g. [3, 6, 3]")
    if 0 in counts[1:-1]:
        raise DeviceMapError(
            f"device_map={shown(counts)} has a stage without layers; only first and last may have none"
        )
    if sum(counts) != layers:
        raise DeviceMapError(f"device_map={shown(counts)} adds up to {sum(counts)} layers, but the model has {layers}")
    if num_stages is not None and num_stages != len(counts):
        raise DeviceMapError(f"device_map={shown(counts)} has {len(counts)} stages, but num_stages={num_stages}")
    return _spans_from_counts(counts, units, placement)


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
    left, device = dict(budgets), 0
    assigned: list[int] = []
    for unit in units:
        if tied and unit.modules == units[-1].modules:
            device = assigned[0]
        while left[device] < unit.parameter_bytes:
            device += 1
            if device == len(devices):
                raise DeviceMapError(
                    f"max_memory is too small: {unit.modules[0]} ({unit.parameter_bytes} bytes) finds no room on "
                    f"{', '.join(devices)}; parameters are never offloaded here. Add devices or memory"
                )
        left[device] -= unit.parameter_bytes
        assigned.append(device)
    return spans_of_runs(assigned)


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
