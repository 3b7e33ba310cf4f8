"""OuroborosArguments: parsing from everywhere, early refusals, and the way to and from disk."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from trainer_helpers import common_options, run_python
from transformers import HfArgumentParser, TrainingArguments

from hf_ouroboros import OuroborosArguments, UnsupportedOptionError

OWN = [f for f in dataclasses.fields(OuroborosArguments) if f.name not in TrainingArguments.__dataclass_fields__]


def arguments(tmp_path: Path, **options: Any) -> OuroborosArguments:
    return OuroborosArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, **options)


# ---- defaults and documentation ----


def test_defaults(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    found = {field.name: getattr(args, field.name) for field in OWN}
    assert found == {
        "schedule": "pipelined",
        "num_stages": None,
        "devices": None,
        "device_map": "auto",
        "max_memory": None,
        "data_parallel_replicas": 1,
        "tied_gradient": "joint",
        "clip_scope": "stage",
        "delay_warmup_steps": 0,
        "delay_compensation": "none",
        "delay_compensation_args": None,
        "eval_mem_len": None,
        "eval_clamp_len": None,
        "recompute": False,
        "weights": "then",
        "fused_head": "auto",
        "resume_changed": "refuse",
        "timeline": None,
    }
    assert args.device_names == ["cpu:0", "cpu:1"]
    assert args.n_gpu <= 1
    assert args.place_model_on_device is False


@pytest.mark.parametrize("field", OWN, ids=lambda f: f.name)
def test_every_option_has_help(field: dataclasses.Field) -> None:
    assert len(field.metadata["help"]) > 20
    assert "%" not in field.metadata["help"], "argparse would read it as a format"


def test_the_help_page(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(OuroborosArguments).parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in OWN)


# ---- parsing ----

PARSED: dict[str, Any] = {
    "schedule": "lockstep",
    "num_stages": 3,
    "devices": ["cpu:0", "cpu:1", "cpu:2"],
    "device_map": {"transformer.wte": 0, "transformer.h": 1},
    "max_memory": {"0": "10GB", "1": 2000000},
    "tied_gradient": "paper",
    "clip_scope": "global",
    "delay_warmup_steps": 7,
    "recompute": True,
    "timeline": "trace.json",
    "learning_rate": 0.5,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "cosine",
}


def assert_parsed(args: OuroborosArguments, device_map: Any = PARSED["device_map"]) -> None:
    found = {name: getattr(args, name) for name in PARSED}
    assert found == PARSED | {"device_map": device_map}


def test_from_the_command_line(tmp_path: Path) -> None:
    text = json.dumps(PARSED["device_map"])
    line = ["--output_dir", str(tmp_path), "--schedule", "lockstep", "--num_stages", "3", "--use_cpu", "True"]
    line += ["--devices", "cpu:0", "cpu:1", "cpu:2", "--device_map", text]
    line += ["--max_memory", json.dumps(PARSED["max_memory"]), "--tied_gradient", "paper", "--clip_scope", "global"]
    line += ["--delay_warmup_steps", "7", "--recompute", "--timeline", "trace.json", "--learning_rate", "0.5"]
    line += ["--gradient_accumulation_steps", "4", "--lr_scheduler_type", "cosine"]
    (args,) = HfArgumentParser(OuroborosArguments).parse_args_into_dataclasses(line)
    assert_parsed(args, device_map=text)  # the split reads JSON


def test_layer_counts_from_the_command_line(tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--device_map", "[1, 3, 1]"]
    (args,) = HfArgumentParser(OuroborosArguments).parse_args_into_dataclasses(line)
    assert json.loads(args.device_map) == [1, 3, 1]


@pytest.mark.parametrize("option", [["--schedule", "zigzag"], ["--clip_scope", "all"], ["--num_stages", "x"]], ids=str)
def test_the_command_line_knows_the_choices(option: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(OuroborosArguments).parse_args_into_dataclasses(["--output_dir", "x", *option])
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["yaml", "json", "dict"])
def test_from_files_and_dicts(tmp_path: Path, kind: str) -> None:
    options = PARSED | {"output_dir": str(tmp_path), "use_cpu": True}
    parser = HfArgumentParser(OuroborosArguments)
    path = tmp_path / f"options.{kind}"
    if kind == "yaml":
        path.write_text(yaml.safe_dump(options))
        (args,) = parser.parse_yaml_file(str(path))
    elif kind == "json":
        path.write_text(json.dumps(options))
        (args,) = parser.parse_json_file(str(path))
    else:
        (args,) = parser.parse_dict(options)
    assert_parsed(args)


# ---- there and back ----

FULL = PARSED | {"optim": "adafactor", "max_steps": 9, "warmup_steps": 2, "eval_strategy": "steps", "eval_steps": 3}


def test_to_dict_and_json(tmp_path: Path) -> None:
    args = arguments(tmp_path, **FULL)
    assert {name: args.to_dict()[name] for name in FULL} == FULL
    assert json.loads(args.to_json_string())["device_map"] == FULL["device_map"]
    assert args.to_sanitized_dict()["schedule"] == "lockstep"
    (again,) = HfArgumentParser(OuroborosArguments).parse_dict(args.to_dict(), allow_extra_keys=True)
    assert again.to_dict() == args.to_dict()


def test_pickle(tmp_path: Path) -> None:
    args = arguments(tmp_path, **FULL)
    assert pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).to_dict() == args.to_dict()


def test_json_with_a_map_of_torch_devices(tmp_path: Path) -> None:
    args = arguments(tmp_path, device_map={"": torch.device("cpu:0")})
    json.loads(args.to_json_string())


def test_replace(tmp_path: Path) -> None:
    args = dataclasses.replace(arguments(tmp_path, **FULL), num_stages=5)
    assert (args.num_stages, args.schedule) == (5, "lockstep")


# ---- from plain TrainingArguments ----


def test_from_training_arguments(tmp_path: Path) -> None:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 0.25,
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_kwargs": {"num_cycles": 1},
        "optim_args": "momentum=0.9",
        "optim": "sgd",
        "label_names": ["labels"],
        "warmup_steps": 4,
        "accelerator_config": {"even_batches": False},
        "bf16": True,
    }
    plain = TrainingArguments(**common_options(tmp_path) | options)
    args = OuroborosArguments.from_training_arguments(plain)
    kept = {name: value for name, value in args.to_dict().items() if name in plain.to_dict()}
    assert kept == plain.to_dict()
    assert args.schedule == "pipelined"
    assert args.device == plain.device
    assert OuroborosArguments.from_training_arguments(args) is args


def test_from_unsupported_training_arguments(tmp_path: Path) -> None:
    plain = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, torch_empty_cache_steps=3)
    with pytest.raises(UnsupportedOptionError, match="torch_empty_cache_steps=3"):
        OuroborosArguments.from_training_arguments(plain)


@dataclasses.dataclass
class ScriptArguments(TrainingArguments):
    """As many scripts do: own options in a subclass of TrainingArguments."""

    my_option: int = 3


def test_from_a_subclass_of_training_arguments(tmp_path: Path) -> None:
    plain = ScriptArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=5)
    assert OuroborosArguments.from_training_arguments(plain).max_steps == 5


# ---- refusals ----

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"fp16_full_eval": True}, "fp16_full_eval"),
    ({"bf16_full_eval": True}, "bf16_full_eval"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size.*per_device_train_batch_size"),
    ({"use_liger_kernel": True}, "use_liger_kernel"),
    ({"neftune_noise_alpha": 0.0}, "neftune_noise_alpha"),
    ({"gradient_checkpointing": True}, "gradient_checkpointing.*recompute=True"),
    ({"torch_empty_cache_steps": 1}, "torch_empty_cache_steps"),
    ({"schedule": "zigzag"}, "schedule='zigzag'.*pipelined"),
    ({"tied_gradient": "none"}, "tied_gradient='none'.*joint"),
    ({"clip_scope": "layer"}, "clip_scope='layer'.*stage"),
    ({"resume_changed": "always"}, "resume_changed='always'.*refuse, accept"),
    ({"delay_compensation": "magic"}, "delay_compensation='magic'.*'magic' is unknown; use none, auto.*nesterov"),
    ({"delay_compensation": ["nesterov", "muon"]}, "nesterov and muon don't go together"),
    ({"delay_compensation": "muon", "optim": "sgd"}, "'muon' brings its own optimizer.*optim='sgd'"),
    ({"delay_compensation": "muon", "delay_compensation_args": "anneal=3"}, "'anneal=3' is no option of.*momentum="),
    (
        {"delay_compensation": "auto", "delay_compensation_args": "anneal=3"},
        "delay_compensation_args='anneal=3' needs to know",
    ),
    ({"data_parallel_replicas": 2}, "data_parallel_replicas=2"),
    ({"num_stages": 0}, "num_stages=0"),
    ({"delay_warmup_steps": -1}, "delay_warmup_steps=-1"),
    ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
    ({"tied_gradient": "paper"}, "tied_gradient='paper'.*schedule='lockstep'"),
    ({"tied_gradient": "paper", "schedule": "1f1b"}, "tied_gradient='paper'"),
    ({"clip_scope": "global"}, "clip_scope='global'.*clip_scope='stage'"),
    ({"timeline": "t.json", "schedule": "reference"}, "timeline.*reference"),
    ({"devices": []}, r"devices=\[\]"),
    ({"devices": ["cpu:0", "cpu:0"]}, "devices=.*different names"),
    ({"devices": ["cpu"]}, "devices names 'cpu'.*cpu:0"),
    ({"devices": ["cuda:0", "cpu:0"]}, "mixes cpu and cuda"),
    ({"devices": ["cuda:99/0", "cuda:99/1"]}, "devices names 'cuda:99/0'"),
    ({"devices": ["cpu:x"]}, "devices names 'cpu:x'"),
    ({"devices": ["cuda:99"]}, "devices names 'cuda:99'"),
    ({"devices": ["tpu:0"]}, "devices names 'tpu:0'"),
    ({"weights": "old"}, "weights='old'.*then, now"),
    ({"weights": "now", "schedule": "1f1b"}, "weights='now'.*schedule='1f1b' none is late.*pipelined, lockstep"),
    ({"weights": "now", "schedule": "zero_bubble"}, "weights='now'.*schedule='zero_bubble' none is late"),
    ({"weights": "now", "schedule": "lockstep", "tied_gradient": "paper"}, "weights='now' and tied_gradient='paper'"),
    (
        {"weights": "now", "delay_compensation": "weight_prediction"},
        "weight_prediction does not go together with weights",
    ),
    ({"weights": "now", "delay_compensation": "muon+gap_aware"}, "gap_aware does not go together with weights='now'"),
    ({"max_memory": "{10GB}"}, "max_memory='{10GB}' must be .*not valid JSON"),
]


@pytest.mark.parametrize(("options", "match"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=match) as caught:
        arguments(tmp_path, **options)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "schedule_free_adamw"])
def test_optimizers_that_are_refused(tmp_path: Path, optim: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=f"optim='{optim}'.*adamw_torch"):
        arguments(tmp_path, optim=optim)


def test_activation_checkpointing_is_refused(tmp_path: Path) -> None:
    if "activation_checkpointing" not in TrainingArguments.__dataclass_fields__:
        pytest.skip("this transformers has no such option")
    with pytest.raises(UnsupportedOptionError, match="checkpointing=True.*recompute=True"):
        arguments(tmp_path, activation_checkpointing=True)


@pytest.mark.slow
def test_processes_that_cannot_find_each_other(tmp_path: Path) -> None:
    """In a process of its own, as accelerate remembers for good what it found in the environment."""
    code = "import os, sys; os.environ['WORLD_SIZE'] = '2'; from hf_ouroboros import OuroborosArguments;"
    done = run_python(code + "OuroborosArguments(output_dir=sys.argv[1], use_cpu=True, report_to=[])", tmp_path)
    assert done.returncode == 1
    assert "ProcessLaunchError: WORLD_SIZE=2, but MASTER_ADDR, MASTER_PORT, RANK not set" in done.stderr


@pytest.mark.parametrize("value", ["1", "0"])
def test_one_process_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    arguments(tmp_path)


ALLOWED: list[dict[str, Any]] = [
    {"clip_scope": "global", "schedule": "lockstep"},
    {"clip_scope": "global", "schedule": "1f1b"},
    {"clip_scope": "global", "schedule": "reference"},
    {"tied_gradient": "paper", "schedule": "reference"},
    {"max_grad_norm": 0.0},
    {"bf16": True},
    {"fp16": True},
    {"devices": ["cpu:3", "cpu:1"]},
    {"num_stages": 1},
]


@pytest.mark.parametrize("options", ALLOWED, ids=str)
def test_allowed(tmp_path: Path, options: dict[str, Any]) -> None:
    args = arguments(tmp_path, **options)
    settings = args.engine_settings(2)
    assert settings.schedule == args.schedule
    assert settings.max_grad_norm == (args.max_grad_norm or None)
    assert settings.autocast_dtype == (torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None)
    assert settings.initial_loss_scale == (65536.0 if args.fp16 else None)
