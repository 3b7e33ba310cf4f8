"""What a staleness study runs: a run's setting, the grids that list settings, and the study's options."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from common import OptionError
from transformers import CONFIG_MAPPING


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        stages: K; 1 is the synchronous run.
        micro_batches: M; divides `rows`.
        compensation: `delay_compensation`.
        compensation_args: `delay_compensation_args`.
        updates: length of the run, over which the learning rate goes to 0.
        model: type of a decoder ("gpt2", "llama", ...) on blocks of text in random order, or "transfo-xl" on contiguous columns
            with memory.
        init_std: of the weights. 0.02, as is usual for models ten times as wide, keeps small ones on the plateau of single
            letters' frequencies for most of a short run.
        rows: sequences per update, over all micro-batches.
        start_from: checkpoint to fine-tune; none for a model from scratch.
        lora_rank: of adapters on all linear modules of the layers, which are then all that is trained; 0 for none.
    """

    stages: int = 1
    micro_batches: int = 1
    compensation: str = "none"
    compensation_args: str = ""
    learning_rate: float = 1e-3
    seed: int = 0
    updates: int = 1000
    warmup_updates: int = 100
    delay_warmup_updates: int = 0
    optim: str = "adamw_torch"
    optim_args: str = ""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    tied_gradient: str = "joint"
    model: str = "gpt2"
    layers: int = 6
    width: int = 128
    heads: int = 4
    init_std: float = 0.05
    rows: int = 16
    block_size: int = 64
    start_from: str = ""
    lora_rank: int = 0

    def __post_init__(self) -> None:
        if self.rows % self.micro_batches:
            raise OptionError(f"micro_batches={self.micro_batches} does not divide rows={self.rows}")
        if self.model not in CONFIG_MAPPING:
            raise OptionError(f"model={self.model!r} is unknown to Transformers; use gpt2, llama, ..., or transfo-xl")
        if self.lora_rank and self.model == "transfo-xl":
            raise OptionError(
                f"lora_rank={self.lora_rank}: adapters are studied on decoders; leave out model=transfo-xl"
            )

    def name(self, data: str) -> str:
        """File name: what one looks for, and a checksum of `data` and of everything that is not as usual.

        What is as usual is left out, so that a new field changes no name; the default of a field must stay what it is.
        """
        special = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        digest = hashlib.sha256(json.dumps([special, data], sort_keys=True).encode()).hexdigest()[:10]
        return (
            f"K{self.stages}-M{self.micro_batches}-{self.compensation}-lr{self.learning_rate:g}-u{self.updates}-"
            f"s{self.seed}-{digest}.json"
        )


@dataclass
class StudyArguments:
    """Which runs, where, how many at once."""

    grid: list[str] = field(default_factory=list, metadata={"help": "YAML files of runs."})
    report: bool = field(default=False, metadata={"help": "Write tables and pictures of the runs that are there."})
    dry_run: bool = field(default=False, metadata={"help": "Only say what would be run."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "Text: 90 %% for training, 5 %% validation, 5 %% test. Default: Python's standard library."},
    )
    output_dir: str = field(default="runs/staleness_study", metadata={"help": "Where the runs' JSON files are."})
    jobs: int = field(default=1, metadata={"help": "Runs at the same time, one thread each."})
    device: str = field(default="cpu:0", metadata={"help": "Device of all runs, e.g. cuda:0."})
    eval_updates: int = field(default=100, metadata={"help": "Updates between evaluations."})
    eval_tokens: int = field(default=16384, metadata={"help": "Validation tokens of an evaluation."})
    test_tokens: int = field(default=131072, metadata={"help": "Test tokens at the end of a run."})


def read_grid(path: str) -> Iterator[Setting]:
    """The runs of a YAML file.

    Raises:
        OptionError: the file is missing or not of this form, or has an unknown key or a value of a wrong type.
    """
    try:
        grid = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        defaults, entries = grid.get("defaults") or {}, grid["runs"]
    except (OSError, yaml.YAMLError, KeyError, AttributeError, TypeError) as error:
        raise OptionError(f"grid={path!r} is no YAML file with a list 'runs': {error}") from error
    for entry in entries:
        values = defaults | entry
        lists = [value if isinstance(value, list) else [value] for value in values.values()]
        for combination in itertools.product(*lists):
            yield _setting(path, dict(zip(values, combination, strict=True)))


def _setting(path: str, values: dict[str, Any]) -> Setting:
    kinds = {f.name: type(f.default) for f in fields(Setting)}
    if unknown := values.keys() - kinds.keys():
        raise OptionError(f"grid={path!r}: {min(unknown)!r} is no field of a run; there are {', '.join(kinds)}")
    try:
        return Setting(**{name: kinds[name](value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise OptionError(f"grid={path!r}: {values}: {error}") from error
