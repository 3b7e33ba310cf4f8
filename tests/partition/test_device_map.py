"""Every accepted form of a device map, and every named error."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ouroboros.errors import DeviceMapError
from hf_ouroboros.partition.device_map import (
    Unit,
    default_num_stages,
    default_placement,
    parse_device_map,
    parse_max_memory,
    plan_stages,
    planned_stages,
)

LAYERS = 6
TWO = ["cuda:0", "cuda:1"]
THREE = [*TWO, "cuda:2"]
NAMES = ["wte", "wpe", *(f"h.{i}" for i in range(LAYERS)), "ln_f", "lm_head"]


def units(tied: bool = True) -> list[Unit]:
    """Six layers of 10 bytes, an embedding of 20, a norm of 1 and a head that costs half a layer."""
    return [
        Unit(("wte", "wpe"), "embedding", 0.0, 20),
        *(Unit((f"h.{i}",), "layer", 1.0, 10) for i in range(LAYERS)),
        Unit(("ln_f",), "head", 0.0, 1),
        Unit(("lm_head",), "head", 0.5, 0 if tied else 20),
    ]


def plan(device_map: Any, devices: list[str] = TWO, tied: bool = True, **kwargs: Any) -> list[tuple[int, int]]:
    """(layers and device) of every stage, after checking that the stages are a cover of all units."""
    spans = plan_stages(device_map, units(tied), devices, tied, **kwargs)
    assert [span.index for span in spans] == list(range(len(spans)))
    bounds = [0, *(span.stop for span in spans)]
    assert [span.start for span in spans] == bounds[:-1] and bounds[-1] == LAYERS + 3
    kinds = [unit.kind for unit in units()]
    return [(kinds[span.start : span.stop].count("layer"), span.device) for span in spans]


def whole(**placed: Any) -> dict[str, Any]:
    """A dict device map with the snake's placement on two devices, and what a test changes."""
    base = {"wte": 0, "wpe": 0, **{f"h.{i}": int(2 <= i) for i in range(LAYERS)}, "ln_f": 1, "lm_head": 0}
    return {**base, **{key.replace("__", "."): value for key, value in placed.items()}}


SNAKE = [(2, 0), (4, 1), (0, 0)]


# ---- defaults ----


@pytest.mark.parametrize(
    ("devices", "tied", "stages"), [(1, True, 1), (1, False, 1), (2, True, 3), (2, False, 2), (8, True, 9)]
)
def test_default_num_stages(devices: int, tied: bool, stages: int) -> None:
    assert default_num_stages(devices, tied) == stages


@pytest.mark.parametrize(
    ("stages", "devices", "tied", "placement"),
    [
        (1, 3, True, [0]),
        (3, 2, True, [0, 1, 0]),
        (3, 3, True, [0, 1, 0]),
        (3, 3, False, [0, 1, 2]),
        (3, 5, False, [0, 1, 2]),
        (3, 2, False, [0, 1, 0]),
        (4, 3, True, [0, 1, 2, 0]),
        (4, 2, False, [0, 1, 1, 0]),
        (6, 3, True, [0, 1, 2, 2, 1, 0]),
        (8, 2, False, [0, 1, 1, 0, 0, 1, 1, 0]),
        (5, 2, True, [0, 1, 1, 0, 0]),
        (4, 1, True, [0, 0, 0, 0]),
    ],
)
def test_default_placement(stages: int, devices: int, tied: bool, placement: list[int]) -> None:
    assert default_placement(stages, devices, tied) == placement


# ---- accepted forms ----


@pytest.mark.parametrize("preset", ["auto", "balanced"])
def test_presets_balance(preset: str) -> None:
    assert plan(preset) == [(1, 0), (3, 1), (2, 0)]  # 3.5 and 3 layers' work
    assert plan(preset, tied=False) == [(3, 0), (3, 1)]
    assert plan(preset, THREE, num_stages=2) == [(1, 0), (5, 0)]  # one device: any split is as good
    assert plan(preset, ["cpu:0"]) == [(6, 0)]


def test_auto_never_makes_empty_stages() -> None:
    assert plan("auto", [f"cuda:{i}" for i in range(12)]) == [*((1, d) for d in range(6)), (0, 0)]


def test_sequential_fills_devices_in_turn() -> None:
    assert plan("sequential", max_memory={0: 45, 1: 100}) == SNAKE
    assert plan("sequential", max_memory={0: 45, "cuda:1": "1KB"}, tied=False) == [(2, 0), (4, 1)]
    assert plan("sequential", THREE, max_memory={0: 25, 1: 35, 2: 100}, tied=False) == [(0, 0), (3, 1), (3, 2)]
    assert plan("sequential", max_memory={0: "1GB", 1: 0}) == [(6, 0)]


@pytest.mark.parametrize(
    "device_map",
    [
        whole(),
        {**whole(), "h.2": "cuda:1", "h.0": "cuda:0", "h.3": "1"},
        {**whole(), "h.2": torch.device("cuda:1"), "h.0": torch.device("cuda", 0)},
        {**whole(), "wte": "cuda", "h.0": torch.device("cuda")},
        {"": 1, "wte": 0, "wpe": 0, "h.0": 0, "h.1": 0, "lm_head": 0},
        {"h": 1, "": 0, "h.0": 0, "h.1": 0, "ln_f": 1},
        {"h": 1, "": 0, "h.0.attn": 0, "h.0": 0, "h.1": 0, "ln_f": 1},
        {**{k: v for k, v in whole().items() if k != "h.0"}, "h.0.attn": 0, "h.0.mlp": 0},
        json.dumps(whole()),
        f"  {json.dumps({'': 1, 'wte': 0, 'wpe': 0, 'h.0': 0, 'h.1': 'cuda:0', 'lm_head': 0})} ",
        {0: [0, 1], 1: [2, 3, 4, 5]},
        {"0": [0, 1], "cuda:1": [5, 4, 3, 2]},
        '{"0": [0, 1], "1": [2, 3, 4, 5]}',
        [2, 4, 0],
        (2, 4, 0),
        "[2, 4, 0]",
    ],
    ids=str,
)
def test_forms_of_the_same_split(device_map: Any) -> None:
    assert plan(device_map) == SNAKE
    assert plan(device_map, num_stages=3) == SNAKE


def test_legacy_map_without_tie_leaves_the_head_behind() -> None:
    assert plan({0: [0, 1], 1: [2, 3, 4, 5]}, tied=False) == [(2, 0), (4, 1)]


def test_cpu_is_a_device_where_devices_are_cpus() -> None:
    assert plan({"": "cpu:1"}, ["cpu:0", "cpu:1"]) == [(6, 1)]
    assert plan({"": "cpu"}, ["cpu:0", "cpu:1"]) == [(6, 0)]


def test_counts_may_leave_first_or_last_without_layers() -> None:
    assert plan([0, 6, 0]) == [(0, 0), (6, 1), (0, 0)]
    assert plan([6]) == [(6, 0)]
    assert plan([3, 2, 1], THREE, tied=False) == [(3, 0), (2, 1), (1, 2)]
    assert plan([2, 1, 2, 1], tied=True) == [(2, 0), (1, 1), (2, 1), (1, 0)]


INTERLEAVED = [(1, 0), (1, 1), (1, 0), (1, 1), (2, 0)]


def test_any_map_is_taken() -> None:
    mapping = {name: 0 for name in NAMES} | {"h.1": 1, "h.3": 1}
    assert plan(mapping) == plan(mapping, num_stages=5) == INTERLEAVED
    assert plan({0: [0, 2, 4, 5], 1: [1, 3]}) == INTERLEAVED
    assert plan([[1, 0], [1, "cuda:1"], [1, 0], [1, "1"], [2, 0]]) == INTERLEAVED
    assert plan("[[1, 0], [1, 1], [1, 0], [1, 1], [2, 0]]") == INTERLEAVED


def test_neighbours_on_one_device() -> None:
    """Only a list can say it."""
    assert plan([(2, 0), (2, 0), (2, 1)], tied=False) == [(2, 0), (2, 0), (2, 1)]
    assert plan([[0, 0], [3, 1], [3, 1], [0, 0]]) == [(0, 0), (3, 1), (3, 1), (0, 0)]


# ---- mixed ----


def test_mixed_is_contiguous_where_that_is_as_good() -> None:
    assert plan("mixed", tied=False) == plan("auto", tied=False) == [(3, 0), (3, 1)]
    assert plan("mixed") == plan("auto") == [(1, 0), (3, 1), (2, 0)]
    assert plan("mixed", ["cpu:0"]) == [(6, 0)]
    assert plan("mixed", THREE, num_stages=1) == [(6, 0)]


def test_mixed_says_why() -> None:
    uneven = [replace(unit, cost=3.0) if unit.modules[0] in ("h.0", "h.3") else unit for unit in units(tied=False)]
    found = planned_stages("mixed", uneven, TWO, tied=False)
    counts = [(sum(u.kind == "layer" for u in uneven[s.start : s.stop]), s.device) for s in found.spans]
    assert counts == [(3, 0), (3, 1)]
    assert (
        found.reason
        == "mixed: the busiest device has 1.048 times the mean work in 2 stages; more would not save 1% of it"
    )
    costs = [4.0, 1.0, 1.0, 4.0, 1.0, 1.0]
    uneven = [replace(u, cost=costs[int(u.modules[0][2:])]) if u.kind == "layer" else u for u in units()]
    found = planned_stages("mixed", uneven, THREE, tied=True)
    assert re.fullmatch(
        r"mixed: the busiest device has 1\.0\d\d times the mean work in \d stages \(.*1\.\d\d\d in 4.*\); one stage more is a "
        r"tick more of delay and two messages more per micro-batch, and has to save 1%, unless the best balance is 3% away",
        found.reason,
    )
    assert planned_stages("auto", uneven, THREE, tied=True).reason == ""


def test_mixed_with_as_many_stages_as_asked_for() -> None:
    for stages in (3, 5, 7):
        assert len(plan("mixed", num_stages=stages)) == stages
    for stages in (3, 4, 6, 8):
        assert (
            len(plan("mixed", THREE, num_stages=stages))
            == len(plan("mixed", THREE, False, num_stages=stages))
            == stages
        )
    found = planned_stages("mixed", units(), TWO, tied=True, num_stages=5)
    assert found.reason.endswith("in 5 stages, as many as asked for")


def test_mixed_keeps_to_max_memory() -> None:
    assert plan("auto", max_memory={0: 35}) == [(1, 0), (5, 1), (0, 0)]
    for budgets in ({0: 35}, {0: 31, 1: 50}, {0: 21}):
        used = {d: sum(10 * n for n, device in plan("mixed", max_memory=budgets) if device == d) for d in (0, 1)}
        assert used[0] + 21 <= budgets[0] and used[1] <= budgets.get(1, 60)
    with pytest.raises(
        DeviceMapError, match="max_memory is too small for stages on cuda:0, cuda:1: even the split that fills"
    ):
        plan("mixed", max_memory={0: 40, 1: 30})
    with pytest.raises(DeviceMapError, match="puts 81 bytes of parameters on cpu:0, where 80 are allowed"):
        plan("mixed", ["cpu:0"], max_memory={0: 80})


# ---- errors ----


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("automatic", "'automatic' is unknown; use one of auto, balanced, sequential"),
        ("{'h': 0}", "not valid JSON"),
        ("[1, 2", "not valid JSON"),
        ("", "is unknown"),
        (whole(h__7=0), "names the module 'h.7', which the model does not have; its parts are wte"),
        (whole(h=0, transformer=0), "'transformer'"),
        ({k: v for k, v in whole().items() if k != "h.3"}, "gap: it places no device for 'h.3'"),
        ({k: v for k, v in whole().items() if k != "wpe"}, "gap: it places no device for 'wpe'"),
        ({}, "gap: it places no device for 'wte'"),
        (whole(h__3="disk"), "offloading is not possible while training"),
        (whole(h__3="cpu"), r"device_map\['h.3'\]='cpu': offloading is not possible"),
        (whole(h__3="meta"), "offloading is not possible"),
        (whole(h__3=2), "not among the 2 devices cuda:0, cuda:1"),
        (whole(h__3=-1), "not among the 2 devices"),
        (whole(h__3="cuda:2"), "not among the 2 devices"),
        (whole(h__3=None), "not among the 2 devices"),
        (whole(wpe=1), "splits wte, wpe over cuda:0, cuda:1; they have to stay on one device"),
        (whole(**{"h.2.attn": 0}), "splits h.2 over cuda:0, cuda:1"),
        (whole(lm_head=1), "embeddings are tied, but the device map puts the input side on cuda:0 and the output"),
        ({0: [0, 1, 2], 1: [2, 3, 4, 5]}, "names layer 2 twice"),
        ({0: [0, 1], 1: [2, 3, 4, 5, 6]}, "names layer 6; the model has layers 0 to 5"),
        ({0: [0, 1], 1: [2, 3, 4]}, "gap: it places no device for 'h.5'"),
        ({0: [0, 1], 1: ["h.2"]}, "names layer 'h.2'"),
        ({0: [0, 1], 2: [2, 3, 4, 5]}, "not among the 2 devices"),
        ([2, 3, 0], "adds up to 5 layers, but the model has 6"),
        ([2, 5], "adds up to 7 layers"),
        ([3, 0, 3], "has a stage without layers; only first and last may have none"),
        ([], "must be a list of layer counts"),
        ([3, -1, 4], "must be a list of layer counts"),
        ([3.0, 3], "must be a list of layer counts"),
        ([True, 5], "must be a list of layer counts"),
        ('[1, "2", 3]', "must be a list of layer counts"),
        ([[3, 0], [3, 2]], r"device_map\[1\]=2 is not among the 2 devices"),
        ([[3, 0], [3, 1, 0]], r"has \[3, 1, 0\] as a stage; give \[layers, device\] for every stage"),
        ([[3, 0], 3], "must be a list of layer counts"),
        ([[2, 0], [3, 1], [0, 0]], "adds up to 5 layers"),
        ([[3, 0], [3, 1]], "embeddings are tied, but the device map puts"),
        (3, "device_map=3 must be a string, a dict or a list"),
        (None, "device_map=None must be a string, a dict or a list"),
    ],
    ids=str,
)
def test_refused(device_map: Any, message: str) -> None:
    with pytest.raises(DeviceMapError, match=message):
        plan(device_map)


@pytest.mark.parametrize("device_map", [[2, 4, 0], whole(), {0: [0, 1], 1: [2, 3, 4, 5]}], ids=str)
def test_num_stages_has_to_agree(device_map: Any) -> None:
    with pytest.raises(DeviceMapError, match="3 stages, but num_stages=4"):
        plan(device_map, num_stages=4)


@pytest.mark.parametrize(("stages", "devices"), [(2, TWO), (4, TWO), (9, TWO), (3, ["cpu:0"])])
def test_num_stages_that_mixed_does_not_have(stages: int, devices: list[str]) -> None:
    with pytest.raises(
        DeviceMapError, match=f"num_stages={stages} does not go with device_map='mixed': neighbouring stages"
    ):
        plan("mixed", devices, num_stages=stages)


def test_num_stages_has_to_agree_with_sequential() -> None:
    with pytest.raises(DeviceMapError, match="'sequential' makes 3 stages, but num_stages=4"):
        plan("sequential", num_stages=4, max_memory={0: 45, 1: 100})
    assert plan("sequential", num_stages=3, max_memory={0: 45, 1: 100}) == SNAKE


def test_sequential_keeps_tied_embeddings_together_on_a_later_device() -> None:
    assert plan("sequential", THREE, max_memory={0: 5, 1: 45, 2: 100}) == [(2, 1), (4, 2), (0, 1)]


def test_more_stages_than_layers() -> None:
    with pytest.raises(DeviceMapError, match="num_stages=7 is more than the model's 6 layers; use at most 6"):
        plan("auto", num_stages=7)
    assert len(plan("auto", num_stages=6)) == 6


@pytest.mark.parametrize(
    ("device_map", "max_memory", "message"),
    [
        ("auto", {0: 30}, "fills them least puts 31 bytes of parameters on cuda:0, where 30 are allowed"),
        ([2, 4, 0], {1: 39}, "the parameters on cuda:1 take 40 bytes, more than max_memory allows \\(39\\)"),
        (whole(), {"cuda:1": 40}, "the parameters on cuda:1 take 41 bytes"),
        ("sequential", {0: 45, 1: 30}, "max_memory is too small: h.5 \\(10 bytes\\) finds no room on cuda:0, cuda:1"),
        ("sequential", {0: 45}, "needs max_memory for each; missing: cuda:1"),
        ("sequential", None, "missing: cuda:0, cuda:1"),
        ("auto", {2: 100}, r"max_memory=2 is not among the 2 devices"),
        ("auto", {"cpu": "10GB"}, "max_memory='cpu': offloading is not possible"),
        ("auto", {0: "lots"}, "max_memory\\[0\\]='lots' is not a size"),
    ],
)
def test_memory_budgets(device_map: Any, max_memory: Any, message: str) -> None:
    with pytest.raises(DeviceMapError, match=message):
        plan(device_map, max_memory=max_memory)


def test_auto_keeps_to_max_memory_where_it_can() -> None:
    assert plan("auto") == [(1, 0), (3, 1), (2, 0)]
    assert plan("auto", max_memory={0: 35}) == [(1, 0), (5, 1), (0, 0)]


def test_enough_memory() -> None:
    assert plan(whole(), max_memory={0: 40, 1: 41}) == SNAKE
    assert parse_max_memory({0: "1KB", "cuda:1": "1KiB"}, TWO) == {0: 1000, 1: 1024}


def test_parse_leaves_everything_but_json_alone() -> None:
    for form in ("auto", "balanced", "sequential", "mixed", {"": 0}, [1, 2]):
        assert parse_device_map(form) is form
    assert parse_device_map('{"": 0}') == {"": 0}


def test_a_map_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(whole()))
    assert plan(str(file)) == SNAKE
    with pytest.raises(
        DeviceMapError, match="missing.json' can't be read: No such file.*`hf-ouroboros plan` writes such a file"
    ):
        parse_device_map(str(tmp_path / "missing.json"))
    file.write_bytes(b"\xff{}")
    with pytest.raises(DeviceMapError, match="plan.json' can't be read .*utf-8"):
        parse_device_map(str(file))
    for text in ("[" * 100_000, '{"a": ' * 100_000):
        file.write_text(text)
        with pytest.raises(DeviceMapError, match="is not valid JSON"):
            parse_device_map(str(file))
    file.write_text("{")
    with pytest.raises(DeviceMapError, match="is not valid JSON"):
        parse_device_map(str(file))
