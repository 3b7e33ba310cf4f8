"""Values of every type for every option: what is meant is taken, everything else refused by name; also in subclasses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_ouroboros import OuroborosArguments, UnsupportedOptionError
from hf_ouroboros.argument_table import OWN


def arguments(tmp_path: Path, **options: Any) -> OuroborosArguments:
    return OuroborosArguments(output_dir=str(tmp_path), report_to=[], **{"use_cpu": True} | options)


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
NESTED: Any = ()
for _ in range(60):
    NESTED = (NESTED, NESTED)
NOTHING = [CYCLE, NESTED, object(), b"1", 1j, float("nan"), "", "\0", [None], {"a": {}}, 10**5000]  # for no option
WRONG: dict[str, list[Any]] = {
    "schedule": [None, 1, True, ["pipelined"], "Pipelined"],
    "num_stages": [True, 2.0, "2.0", "two", [2], np.float32(2), -1, 10**9],
    "devices": ["cpu:0", {"cpu:0": 1}, [0], [["cpu:0"]], ["cpu:0"] * 10_000],
    "device_map": [None, 3, True, [], [1.5], [True], [-1], "[1,", '{"a": 1', {"": 1.5}, {"": None}, "[" * 100_000],
    "max_memory": [1, [], True, "[]", "1", {"0": None}, {"0": -1}, {"0": 1.5}, {"0": True}, {None: 1}],
    "data_parallel_replicas": [None, True, 1.0, 0, -1],
    "tied_gradient": [None, 0, ["joint"]],
    "clip_scope": [None, 0, {"stage": 1}],
    "delay_warmup_steps": [None, True, 1.0, -1, 10**20],
    "delay_compensation": [None, 1, [1], [["muon"]], {}],
    "delay_compensation_args": [1, ["anneal=1"], {"anneal": []}, {1: 1}, True],
    "eval_mem_len": [True, 1.0, -1, 10**12],
    "eval_clamp_len": [True, 1.0, -2, 10**12],
    "recompute": [None, 2, 0.0, "maybe", [], np.int64(3)],
    "weights": [None, True, 0, ["now"], "Now"],
    "fused_head": [None, True, 1, "yes", [], "ON"],
    "timeline": [1, True, ["t"], {}, b"t"],
    "gradient_accumulation_steps": [None, True, 1.0, 0, -1, 10**12],
    "max_grad_norm": [True, "x", [1.0], -1],
    "seed": [None, True, 1.5, -1, 2**32],
    "learning_rate": [None, True, "fast", -1.0, float("inf")],
    "adam_beta1": [None, True, 1.0, -0.1],
    "bf16": ["maybe", 2, [True]],
    "fp16": ["maybe", 2, [True]],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_by_name(tmp_path: Path, name: str) -> None:
    for value in WRONG[name] + NOTHING:
        if name in ("device_map", "delay_compensation", "delay_compensation_args") and value in ("\0", ""):
            continue  # looked up, or read, by who knows the names
        with pytest.raises(UnsupportedOptionError, match=f"^{name}") as caught:
            arguments(tmp_path, **{name: value})
        assert len(str(caught.value)) < 1000


SAME: list[tuple[str, Any, Any]] = [
    ("recompute", "false", False),
    ("recompute", "True", True),
    ("recompute", 0, False),
    ("recompute", np.bool_(True), True),
    ("num_stages", "3", 3),
    ("num_stages", np.int64(3), 3),
    ("num_stages", torch.tensor(3), 3),
    ("delay_warmup_steps", np.int32(2), 2),
    ("learning_rate", "1e-3", 1e-3),
    ("learning_rate", np.float64(0.5), 0.5),
    ("max_grad_norm", None, None),
    ("max_grad_norm", float("inf"), float("inf")),
    ("bf16", "false", False),
    ("devices", (torch.device("cpu:0"), "cpu:1"), ["cpu:0", "cpu:1"]),
    ("device_map", (1, np.int64(2), 1), [1, 2, 1]),
    ("max_memory", {torch.device("cpu:0"): "1GB", 1: np.int64(5)}, {"cpu:0": "1GB", 1: 5}),
    ("delay_compensation", ("muon", "lr_rescale"), "muon+lr_rescale"),
    ("timeline", Path("trace"), "trace"),
]


@pytest.mark.parametrize(("name", "given", "meant"), SAME, ids=str)
def test_what_is_meant_is_taken(tmp_path: Path, name: str, given: Any, meant: Any) -> None:
    found = getattr(arguments(tmp_path, **{name: given}), name)
    assert found == meant and type(found) is type(meant)


def test_options_of_compensations_as_a_mapping(tmp_path: Path) -> None:
    options = {"anneal": 0, "rescaled": "adamw"}
    args = arguments(tmp_path, delay_compensation="muon+lr_rescale", delay_compensation_args=options)
    assert args.delay_compensation_args == "anneal=0,rescaled=adamw"


def test_every_own_option_has_a_rule() -> None:
    assert OuroborosArguments.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__.keys() == OWN.keys()


@dataclasses.dataclass
class OtherDefaults(OuroborosArguments):
    """As scripts do that always want something else."""

    schedule: str = "1f1b"
    clip_scope: str = "global"
    recompute: bool = True


def test_a_subclass_with_other_defaults(tmp_path: Path) -> None:
    args = OtherDefaults(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    assert (args.schedule, args.clip_scope, args.recompute) == ("1f1b", "global", True)
    line = ["--output_dir", str(tmp_path), "--schedule", "lockstep", "--use_cpu", "True"]
    (args,) = HfArgumentParser(OtherDefaults).parse_args_into_dataclasses(line)
    assert (args.schedule, args.clip_scope) == ("lockstep", "global")
    with pytest.raises(UnsupportedOptionError, match="schedule='zigzag' is unknown; use one of"):
        OtherDefaults(output_dir=str(tmp_path), schedule="zigzag")
