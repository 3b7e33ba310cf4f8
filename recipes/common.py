"""What the recipes share: options from YAML and command line, text of bounded size, measurements, the final table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import TrainOutput

from hf_ouroboros import DeviceMapError, OuroborosArguments, OuroborosTrainer, UnsupportedOptionError
from hf_ouroboros.commands import overrides
from hf_ouroboros.data import BYTE_VOCAB_SIZE, Corpus, default_corpus, ends_lines
from hf_ouroboros.data.errors import DataError
from hf_ouroboros.schedules import SCHEDULES

CORPUS_BYTES = 450_000  # of the offline corpus, for training; sets the length of the default run
VALIDATION_SHARE = 0.05

Script = TypeVar("Script")


class OptionError(UnsupportedOptionError):
    """An option of a recipe, or a key of its configuration file, that can't be used; the message says why."""


def run_recipe(main: Callable[[], None]) -> None:
    """Runs a recipe; an option, or data, that can't be used are told in a line, with exit status 2, as argparse does."""
    try:
        main()
    except (UnsupportedOptionError, DeviceMapError, DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


# ---- options ----


def parse_options(
    script_class: type[Script],
    defaults: Mapping[str, Any],
    arguments: Sequence[str] | None = None,
    smoke: Mapping[str, Any] | None = None,
    arguments_class: type[OuroborosArguments] = OuroborosArguments,
) -> tuple[Script, Any]:
    """The options of a recipe: defaults, overridden by `--config FILE.yaml`, overridden by the command line.

    Args:
        script_class: dataclass of the recipe's own options.
        defaults: the recipe's defaults for fields of `OuroborosArguments`.
        arguments: the command line; `sys.argv[1:]` if None.
        smoke: what `--smoke` stands for: options that win over the file, but not over the command line.
        arguments_class: of what besides the recipe's own options.

    Raises:
        OptionError: the configuration file is missing, is no mapping, or has an unknown key; TrainingArguments can't use an
            option.
    """
    parser = HfArgumentParser((script_class, arguments_class), description=sys.modules[script_class.__module__].__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options; the command line wins.")
    parser.set_defaults(**defaults)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Options of the file become options of the command line, in front: one place checks types and choices.
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    config.add_argument("--smoke", nargs="?", const="true")
    early = config.parse_known_args(arguments)[0]
    known = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    if smoke is not None and str(early.smoke).lower() in ("true", "1", "yes"):
        arguments = [*_as_arguments("--smoke", smoke, known), *arguments]
    if early.config is not None:
        arguments = [*_as_arguments(early.config, _read_config(early.config), known), *arguments]
    try:
        script, args, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except UnsupportedOptionError:
        raise
    except (ValueError, TypeError, KeyError) as error:  # as TrainingArguments says it
        raise OptionError(f"an option of training can't be used: {error}") from error
    return script, args


def _read_config(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise OptionError(f"config={path!r} does not exist; name a YAML file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise OptionError(f"config={path!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise OptionError(f"config={path!r} must hold 'option: value' lines, not {type(values).__name__}")
    return values


def _as_arguments(path: str, values: dict[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if name not in known or name == "config":
            raise OptionError(f"config={path!r} has the key {name!r}, which is no option; --help lists them")
        if value is None:
            continue
        if isinstance(value, list) and known[name].nargs == "+":
            yield from (f"--{name}", *map(str, value))
        else:
            yield f"--{name}={json.dumps(value) if isinstance(value, list | dict) else value}"


def read_overrides(text: str, config: PretrainedConfig) -> dict[str, Any]:
    """Values of `config_overrides`, e.g. `n_layer=6,cutoffs=[20,400]`, each of the type that the configuration has.

    Raises:
        OptionError: not of the form name=value, an unknown name, or a value of another type.
    """
    try:
        return overrides.read_overrides(text, config, "config_overrides")
    except UnsupportedOptionError as error:
        raise OptionError(str(error)) from error


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises OptionError if the tokenizer has tokens that the model doesn't know."""
    known = model.config.get_text_config().vocab_size
    if len(tokenizer) > known:
        raise OptionError(
            f"tokenizer_name: {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, the model only {known}; use the "
            "tokenizer that belongs to the model"
        )


def choose_timeline(wanted: bool, args: OuroborosArguments) -> None:
    """Puts the timeline beside the model, unless it has a place or can't be recorded."""
    if wanted and args.timeline is None and SCHEDULES[args.schedule].uses_devices:
        args.timeline = str(Path(args.output_dir) / "timeline")


def train_or_resume(trainer: OuroborosTrainer) -> TrainOutput:
    """Trains; `--resume_from_checkpoint true` continues from the newest checkpoint, a path from that one."""
    resume = trainer.args.resume_from_checkpoint
    return trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)


def say(args: OuroborosArguments, *text: Any) -> None:
    """Prints, in the main process only."""
    if args.should_save:
        print(*text, flush=True)


def whole_model(trainer: OuroborosTrainer) -> PreTrainedModel:
    """The trained model in one piece: the trainer's, or, where processes hold its parts, the saved one."""
    if trainer.args.world_size == 1:
        return trainer.model
    return AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)


def final_loss(trainer: OuroborosTrainer) -> float:
    """Validation loss of the trained model, from the evaluation at the end of training where there was one."""
    for entry in trainer.state.log_history:
        if (
            "eval_loss" in entry
            and entry["step"] == trainer.state.global_step
            and not trainer.args.load_best_model_at_end
        ):
            return entry["eval_loss"]
    return trainer.evaluate()["eval_loss"]


# ---- text ----


def stdlib_corpus(train_bytes: int = CORPUS_BYTES, validation_share: float = VALIDATION_SHARE) -> Corpus:
    """The offline corpus with so many bytes for training."""
    return default_corpus(round(train_bytes / (1 - validation_share)), validation_share)


def read_files(option: str, names: Iterable[str]) -> list[str]:
    """The text of files.

    Raises:
        OptionError: a file that doesn't exist, or is no UTF-8.
    """
    texts = []
    for name in names:
        if not Path(name).is_file():
            raise OptionError(f"{option}: no file at {name}")
        try:
            texts.append(Path(name).read_bytes().decode())
        except UnicodeDecodeError as error:
            raise OptionError(f"{option}: {name} is no UTF-8 text ({error}); prepare_lm.py takes raw bytes") from error
    return texts


def limit_bytes(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Texts until `max_bytes` of UTF-8 are full; the one that crosses the bound is cut."""
    room = math.inf if max_bytes is None else max_bytes
    for text in texts:
        data = text.encode()
        if len(data) > room:
            text = data[: int(room)].decode(errors="ignore")
        if text:
            yield text
        room -= len(data)
        if room <= 0:
            return


def count_characters(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """How many characters the texts have, and their unit: bytes under the byte tokenizer, as is usual there."""
    if len(tokenizer) == BYTE_VOCAB_SIZE:
        return sum(len(text.encode()) for text in texts), "byte"
    return sum(map(len, texts)), "character"


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, greedy: bool = False
) -> str:
    """Up to `tokens` tokens that the model writes after a prompt, the same every time.

    A text longer than the model's positions is written in parts, each seeing the end of what is there.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.8, "top_k": 40}
    special = not ends_lines(tokenizer)  # a prompt is no complete line
    encoded = tokenizer(prompt or tokenizer.eos_token, add_special_tokens=special, return_tensors="pt")
    ids = encoded["input_ids"].to(model.device)
    prompted = ids.shape[1]
    model.eval()
    torch.manual_seed(0)
    while (missing := prompted + tokens - ids.shape[1]) > 0:
        seen = ids if ids.shape[1] < positions else ids[:, -positions // 2 :]
        mask, new = torch.ones_like(seen), min(missing, positions - seen.shape[1])
        output = model.generate(
            seen, attention_mask=mask, max_new_tokens=new, pad_token_id=tokenizer.eos_token_id, **how
        )
        ids = torch.cat([ids, output[:, seen.shape[1] :]], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, prompted:], skip_special_tokens=True)


# ---- measurements ----


@dataclasses.dataclass
class Speed:
    """Busy share by device name, and ticks per second, in the part of the run that `where` names."""

    busy: dict[str, float]
    ticks_per_second: float
    where: str


def measure_speed(trainer: OuroborosTrainer) -> Speed | None:
    """How busy the devices were after the last evaluation inside the run; None without a timeline."""
    timeline, state = trainer.timeline, trainer.state
    if timeline is None:
        return None
    # The devices rest during an evaluation, which says nothing about the schedule.
    evaluated = [e["step"] for e in state.log_history if "eval_loss" in e and e["step"] < state.global_step]
    micro_batches = trainer.args.gradient_accumulation_steps
    after_tick = max(evaluated, default=0) * micro_batches + trainer.stage_plan.num_stages
    try:
        start, end = timeline.steady_interval(after_tick, micro_batches)
        where = "steady interval"
    except ValueError:  # a run of a few ticks
        (start, end), where = timeline.interval, "whole run"
    ticks = sum(start < finished <= end for finished in timeline.forward_ends().values())
    busy = dict(zip(timeline.device_names, timeline.busy_shares(start, end), strict=True))
    return Speed(busy, ticks / (end - start), where)


def busy_rows(speed: Speed | None) -> list[tuple[str, str]]:
    """Busy shares as rows of the final table."""
    if speed is None:
        return []
    return [(f"{device} busy ({speed.where})", f"{share:.1%}") for device, share in speed.busy.items()]


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A title and two columns, the second one aligned on the right."""
    rows = list(rows)
    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    print(f"\n{title}\n{'-' * (left + right + 2)}")
    for name, value in rows:
        print(f"{name:<{left}}  {value:>{right}}")
    print(flush=True)
