"""Any value for any option of training: taken as what it says, or refused by name before anything starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import JSON, NUMBERS, TEXTS, fuzzed
from hypothesis import given
from hypothesis import strategies as st

from hf_ouroboros import OuroborosArguments, UnsupportedOptionError
from hf_ouroboros.argument_table import ARGUMENTS
from hf_ouroboros.errors import DeviceMapError
from hf_ouroboros.optim import choose
from hf_ouroboros.optim.choice import COMPENSATIONS, NAMES, OPTIMIZERS
from hf_ouroboros.options import OneOf
from hf_ouroboros.partition.device_map import parse_device_map, plan_stages
from hf_ouroboros.partition.units import Unit

VALUES = st.one_of(
    JSON,
    st.sampled_from([np.int64(3), np.float32(0.5), np.bool_(True), np.array([1]), np.array(2), np.float64("nan"), torch.tensor(3),
                     torch.tensor(0.5), torch.ones(2), torch.device("cpu:0"), b"x", 1j, object(), (1, 2), {1, 2}, range(3)]),
    st.sampled_from([word for rule in ARGUMENTS.values() if isinstance(rule, OneOf) for word in rule.words]),
    st.lists(st.sampled_from(["cpu:0", "cpu:1", *NAMES]), max_size=3),
    st.sampled_from(NAMES),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("options"))


@fuzzed(share=6)
@given(st.dictionaries(st.sampled_from(sorted(ARGUMENTS)), VALUES, min_size=1, max_size=2))
def test_arguments(folder: str, given_options: dict[str, Any]) -> None:
    try:
        args = OuroborosArguments(output_dir=folder, report_to=[], **{"use_cpu": True} | given_options)
    except UnsupportedOptionError as error:
        assert any(name in str(error) for name in ARGUMENTS) and len(str(error)) < 2000
        return
    for name in given_options:
        value = getattr(args, name)
        assert type(value) in (str, int, float, bool, list, dict, type(None)), (name, value)
        rule = ARGUMENTS[name]
        assert (value is None and rule.optional) or rule.read(value) == value, "what was taken would be taken again"
    args.to_json_string()
    args.engine_settings(2)


PARTS = sorted({name for kind in (*OPTIMIZERS.values(), *COMPENSATIONS.values()) for name in kind.__dataclass_fields__})
ASSIGNMENTS = st.lists(
    st.one_of(TEXTS, st.builds("{}={}".format, st.sampled_from(PARTS), st.one_of(TEXTS, st.sampled_from(NUMBERS), st.floats()))),
    max_size=3,
).map(",".join)  # fmt: skip


@fuzzed(share=6)
@given(st.one_of(TEXTS, st.lists(st.sampled_from(NAMES), max_size=3).map("+".join)), st.one_of(st.none(), ASSIGNMENTS))
def test_compensations(text: str, options: str | None) -> None:
    try:
        choice = choose(text, options)
    except UnsupportedOptionError as error:
        assert "delay_compensation" in str(error)
        return
    assert choose(str(choice), choice.options) == choice


UNITS = [
    Unit(("wte", "wpe"), "embedding", 0.0, 100),
    *(Unit((f"h.{i}",), "layer", 1.0, 100) for i in range(4)),
    Unit(("ln_f",), "head", 0.0, 10),
    Unit(("lm_head",), "head", 1.0, 0),
]
MODULES = ["", "wte", "wpe", "h", "h.0", "h.1", "h.2", "h.3", "ln_f", "lm_head", "h.1.attn", "x"]
DEVICES = ["cpu:0", "cpu:1", "0", "1", 0, 1, 2, "disk", "cpu", None, "²"]
MAPS = st.one_of(
    JSON,
    st.sampled_from(["auto", "balanced", "sequential", "mixed"]),
    st.dictionaries(st.sampled_from(MODULES), st.sampled_from(DEVICES), max_size=8),
    st.dictionaries(st.sampled_from([0, 1, "0", "cpu:1", "²"]), st.lists(st.integers(-1, 5), max_size=4), max_size=3),
    st.lists(st.integers(-1, 5), max_size=5),
    st.lists(st.lists(st.one_of(st.integers(-1, 5), st.sampled_from(DEVICES)), min_size=1, max_size=3), max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), max_size=6),
)


@fuzzed(share=6)
@given(
    MAPS,
    st.one_of(st.none(), st.integers(1, 8)),
    st.booleans(),
    st.one_of(st.none(), JSON, st.just({0: 400, 1: "1KB"})),
)
def test_device_maps(device_map: Any, num_stages: int | None, tied: bool, max_memory: Any) -> None:
    try:
        args = OuroborosArguments(
            output_dir="x", report_to=[], use_cpu=True, device_map=device_map, max_memory=max_memory
        )
        form = parse_device_map(args.device_map)
        spans = plan_stages(form, UNITS, ["cpu:0", "cpu:1"], tied, num_stages, args.max_memory)
    except (DeviceMapError, UnsupportedOptionError) as error:
        assert len(str(error)) < 2000
        return
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(len(UNITS)))
    assert num_stages in (None, len(spans))
