"""What each option of OuroborosArguments may be: the table by which all of them are read and checked, in one place.

Of TrainingArguments it has what the engine and its optimizers take without asking anybody else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .options import Flag, Number, OneOf, Place, Rule, Whole, Words, from_json, plain
from .schedules import SCHEDULES

MOST_DEVICES = 4096
LONG = 2**40  # more updates than anybody makes


@dataclass(frozen=True)
class DeviceMap(Rule):
    """Its form only: names are looked up in the model when it is split."""

    @property
    def what(self) -> str:
        return (
            "auto, mixed, balanced, sequential, {module name prefix: device}, a list of layer counts or of [layers, device], "
            "one of the latter two as JSON, or a .json file"
        )

    def read(self, value: Any) -> Any:
        if isinstance(value, str) and value.strip():
            if value.strip()[0] in "[{":
                try:
                    from_json(value)
                except ValueError as error:
                    raise ValueError(f"not valid JSON: {error}") from None
            return str(value)
        if isinstance(value, Mapping):
            return {k: d if isinstance(d, list | tuple) else _device(d) for k, d in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str | bytes) and value:
            return [_stage(stage) for stage in value]
        raise ValueError


def _stage(value: Any) -> Any:
    """A stage of a list: how many layers it has, or (layers, device)."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == 2:
        return [Whole(0, LONG).read(value[0]), _device(value[1])]
    return Whole(0, LONG).read(value)


@dataclass(frozen=True)
class MaxMemory(Rule):
    """A dict, or JSON of one; sizes are read when the model is split."""

    optional: bool = field(default=True, kw_only=True)

    @property
    def what(self) -> str:
        return """{device: bytes or size}, e.g. {"0": "10GB"}, or JSON of it"""

    def read(self, value: Any) -> dict[Any, int | str]:
        if isinstance(value, str):
            try:
                value = from_json(value)
            except ValueError as error:
                raise ValueError(f"not valid JSON: {error}") from None
        if not isinstance(value, Mapping):
            raise ValueError
        budgets = {_device(key): plain(size) for key, size in value.items()}
        for size in budgets.values():
            if isinstance(size, bool) or not isinstance(size, int | str) or (isinstance(size, int) and size < 0):
                raise ValueError
        return budgets


@dataclass(frozen=True)
class Joined(Rule):
    """Names joined by "+", or a list of them."""

    @property
    def what(self) -> str:
        return "none, auto, muon+auto, or names joined by '+'"

    def read(self, value: Any) -> str:
        if isinstance(value, str):
            return str(value)
        return "+".join(Words(16, "").read(value))


@dataclass(frozen=True)
class Assignments(Rule):
    """Text "name=value,name=value", or a dict of such."""

    optional: bool = field(default=True, kw_only=True)

    @property
    def what(self) -> str:
        return "'name=value' joined by ',', or a dict"

    def read(self, value: Any) -> str:
        if isinstance(value, Mapping):
            pairs = [(name, plain(given)) for name, given in value.items()]
            if not all(isinstance(name, str) and isinstance(given, str | int | float) for name, given in pairs):
                raise ValueError
            return ",".join(f"{name}={given}" for name, given in pairs)
        if not isinstance(value, str):
            raise ValueError
        return str(value)


def _device(value: Any) -> str | int:
    """A device by name or number; loggers write arguments as JSON, so a `torch.device` becomes its name."""
    value = plain(value)
    if isinstance(value, str) or type(value).__name__ == "device":
        return str(value)
    return Whole(0, MOST_DEVICES).read(value)


OWN: dict[str, Rule] = {
    "schedule": OneOf(SCHEDULES),
    "num_stages": Whole(1, MOST_DEVICES + 1, optional=True),
    "devices": Words(MOST_DEVICES, "cpu:0 cpu:1", optional=True),
    "device_map": DeviceMap(),
    "max_memory": MaxMemory(),
    "data_parallel_replicas": Whole(1, 2**20),
    "tied_gradient": OneOf("joint", "paper"),
    "clip_scope": OneOf("stage", "global"),
    "fused_head": OneOf("auto", "on", "off"),
    "resume_changed": OneOf("refuse", "accept"),
    "delay_warmup_steps": Whole(0, LONG),
    "delay_compensation": Joined(),
    "delay_compensation_args": Assignments(),
    "eval_mem_len": Whole(0, 2**24, optional=True),
    "eval_clamp_len": Whole(-1, 2**24, optional=True),
    "recompute": Flag(),
    "weights": OneOf("then", "now"),
    "timeline": Place(optional=True),
}
INHERITED: dict[str, Rule] = {
    "gradient_accumulation_steps": Whole(1, 2**20),
    "max_grad_norm": Number(0.0, infinite=True, optional=True),
    "seed": Whole(0, 2**32 - 1),
    "learning_rate": Number(0.0),
    "weight_decay": Number(),
    "adam_beta1": Number(0.0, 1.0, below=True),
    "adam_beta2": Number(0.0, 1.0, below=True),
    "adam_epsilon": Number(0.0),
    "bf16": Flag(optional=True),
    "fp16": Flag(optional=True),
    "use_cpu": Flag(optional=True),
    "ddp_timeout": Whole(1, 10**9),
}
ARGUMENTS: dict[str, Rule] = OWN | INHERITED


def words_of(name: str) -> Collection[str]:
    """The words between which an option chooses; those of a registry as it is when they are looked at."""
    rule = ARGUMENTS[name]
    assert isinstance(rule, OneOf)
    return rule.words
