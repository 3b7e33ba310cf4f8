"""The model card: facts of a run in, a README for the Hub out. Reads no clock, no network, no model.

The wording is in `model_card_template.md`; here are the facts, the tables and the metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..schedules import schedule_named

TAG = "ouroboros"
MAX_LOSS_ROWS = 12
STAGE_COLUMNS = {
    "stage": "Stage",
    "device": "Device",
    "layers": "Layers",
    "parameters": "Parameters",
    "delay": "Delay in micro-batches",
}


@dataclass
class CardFacts:
    """What is known of a run; what is None or empty is left out of the card.

    Args:
        model_name: name for the heading and the metadata.
        model_type: `config.model_type`.
        num_parameters: of the whole model, tied ones counted once.
        schedule: name of the schedule.
        num_stages: K.
        devices: device names in order.
        stages: one dict per stage: stage, device, layers, parameters, delay (in ticks); keys may miss.
        micro_batches_per_update: M.
        load_import: module to import before loading, for architectures transformers does not know.
        repo_id: what `from_pretrained` gets in the example; `model_name` where not given.
        dataset_name: of the data; the metrics go into the metadata only if it is known.
        dataset_id: the data set's id on the Hub, where it has one.
        metrics: name -> final value.
        log_history: the entries of Trainer's `state.log_history`.
        timeline_picture: file name of the picture inside the repository.
        train_runtime: seconds.
        tokenizer: whether the repository holds a tokenizer.
        encoder_decoder: whether it is an encoder-decoder model.
        adapter: the kind of PEFT's adapter that the repository holds in the place of a model.
        trained_parameters: how many were trained, where others were frozen.
    """

    model_name: str
    model_type: str
    num_parameters: int
    schedule: str
    num_stages: int
    devices: list[str] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    micro_batches_per_update: int = 1
    tied_gradient: str | None = None
    delay_warmup_steps: int = 0
    clip_scope: str | None = None
    recompute: bool = False
    weights: str = "then"
    delay_compensation: str = "none"
    delay_compensation_args: str = ""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    load_import: str | None = None
    repo_id: str | None = None
    dataset_name: str | None = None
    dataset_description: str | None = None
    dataset_id: str | None = None
    tags: list[str] = field(default_factory=list)
    license: str | None = None
    language: str | list[str] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    timeline_picture: str | None = None
    train_runtime: float | None = None
    tokens_seen: int | None = None
    tokens_per_second: float | None = None
    tokenizer: bool = False
    adapter: str | None = None
    trained_parameters: int | None = None
    encoder_decoder: bool = False
    split_reason: str = ""

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads the model."""
        return "AutoModelForSeq2SeqLM" if self.encoder_decoder else "AutoModelForCausalLM"

    @property
    def task(self) -> str:
        """What the Hub calls the model's task."""
        return "text2text-generation" if self.encoder_decoder else "text-generation"


def build_card(facts: CardFacts) -> ModelCard:
    """The card, with YAML metadata; the same facts always give the same text."""
    schedule = schedule_named(facts.schedule)
    delayed = not schedule.is_synchronous and facts.num_stages > 1
    base = f", starting from `{_shown_base(facts.base_model)}`" if facts.base_model else ""
    return ModelCard.from_template(
        _metadata(facts),
        template_str=files("hf_ouroboros.hub").joinpath("model_card_template.md").read_text(encoding="utf-8"),
        facts=facts,
        delayed=delayed,
        simulated=not schedule.uses_devices,
        kind=f"{_thing(facts)} ({_counts(facts)}{base})",
        base_name=json.dumps(_shown_base(facts.base_model), ensure_ascii=False) if facts.base_model else '"..."',
        load_name=json.dumps(facts.repo_id or facts.model_name, ensure_ascii=False),
        procedure_table=table(("", ""), _procedure(facts, delayed)),
        stage_table=_stage_table(facts.stages),
        hyperparameter_table=table(("Name", "Value"), facts.hyperparameters.items()),
        metric_table=table(("Metric", "Value"), facts.metrics.items()),
        loss_table=_loss_table(facts.log_history),
        staleness=_cell((facts.num_stages - 1) / facts.micro_batches_per_update),
        version_table=table(("Package", "Version"), facts.versions.items()),
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; rows whose last cell is None are dropped, and without rows it is the empty string."""
    lines = [[_cell(value) for value in row] for row in rows if row[-1] is not None]
    if not lines:
        return ""
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), ["---"] * len(header), *lines])


def _cell(value: Any) -> str:
    """One value as a table shows it, on one line and with `|` escaped."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_cell(item)}" for key, item in value.items())
    return " ".join(str(value).replace("|", "\\|").split())


def _procedure(facts: CardFacts, delayed: bool) -> list[tuple[str, Any]]:
    """How the run was made: name, value; None where unknown."""
    delays = [row["delay"] for row in facts.stages if row.get("delay") is not None]
    return [
        ("Schedule", f"`{facts.schedule}` ({schedule_named(facts.schedule).summary})"),
        ("Stages (K)", facts.num_stages),
        ("Devices", facts.devices or None),
        ("Split", facts.split_reason or None),
        ("Delay of each stage, in micro-batches", delays or None),
        ("Micro-batches per update (M)", facts.micro_batches_per_update),
        ("Updates without delay at the start", facts.delay_warmup_steps if delayed else None),
        ("Gradient of the tied embedding", facts.tied_gradient),
        ("Scope of gradient clipping", facts.clip_scope),
        ("Activations recomputed", facts.recompute),
        ("Weights of late backwards", "those of now (features replay)" if delayed and facts.weights == "now" else None),
        ("Delay compensation", facts.delay_compensation if delayed else None),
        ("Its options", facts.delay_compensation_args or None if delayed else None),
        ("Training time", None if facts.train_runtime is None else f"{facts.train_runtime:,.1f} s"),
        ("Tokens seen", None if facts.tokens_seen is None else f"{facts.tokens_seen:,}"),
        ("Tokens per second", None if facts.tokens_per_second is None else f"{facts.tokens_per_second:,.0f}"),
        ("Seed", facts.seed),
    ]


def _stage_table(stages: list[dict[str, Any]]) -> str:
    columns = [column for column in STAGE_COLUMNS if any(row.get(column) is not None for row in stages)]
    rows = []
    for row in stages:
        count = row.get("parameters")
        shown = row | {"parameters": f"{count:,}" if isinstance(count, int) else count}
        rows.append([_cell(shown.get(column)) for column in columns])
    return table([STAGE_COLUMNS[column] for column in columns], rows)


def _loss_table(log_history: list[dict[str, Any]]) -> str:
    """Training and evaluation loss by step, in at most `MAX_LOSS_ROWS` rows, the last step among them."""
    by_step: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        if "step" in entry and ("loss" in entry or "eval_loss" in entry):
            by_step.setdefault(entry["step"], {}).update(entry)
    entries = [by_step[step] for step in sorted(by_step)]
    evaluated = _thin([e for e in entries if "eval_loss" in e], MAX_LOSS_ROWS // 2)
    rest = _thin([e for e in entries if "eval_loss" not in e], MAX_LOSS_ROWS - len(evaluated))
    columns = {"step": "Step", "epoch": "Epoch", "loss": "Training loss", "eval_loss": "Evaluation loss"}
    present = [column for column in columns if any(column in e for e in entries)]
    rows = sorted(evaluated + rest, key=lambda e: e["step"])
    return table([columns[c] for c in present], ([_cell(e.get(c)) for c in present] for e in rows))


def _thin(entries: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` (2 or more) entries, evenly spaced, the first and the last among them."""
    if len(entries) <= limit:
        return entries
    return [entries[round(i * (len(entries) - 1) / (limit - 1))] for i in range(limit)]


def _metadata(facts: CardFacts) -> ModelCardData:
    """The YAML header; metrics become a model-index if the data set is named: the format wants its name."""
    results = []
    for name, value in facts.metrics.items() if facts.dataset_name else ():
        if isinstance(value, int | float) and math.isfinite(value):
            result = EvalResult(
                task_type=facts.task,
                task_name="Text-to-text generation" if facts.encoder_decoder else "Causal language modeling",
                dataset_type=facts.dataset_id or "other",
                dataset_name=str(facts.dataset_name),
                metric_type=name.removeprefix("eval_"),
                metric_name=name,
                metric_value=value,
            )
            results.append(result)
    return ModelCardData(
        model_name=facts.model_name if results else None,
        eval_results=results or None,
        base_model=facts.base_model if _is_hub_id(facts.base_model) else None,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        language=facts.language or None,
        library_name="peft" if facts.adapter else "transformers",
        license=facts.license,
        pipeline_tag=facts.task,
        tags=[TAG, *(tag for tag in facts.tags if tag != TAG)],
    )


def _thing(facts: CardFacts) -> str:
    """What the repository holds."""
    model = f"`{facts.model_type}` {'encoder-decoder' if facts.encoder_decoder else 'causal'} language model"
    return f"{facts.adapter} adapter of a {model}" if facts.adapter else model


def _counts(facts: CardFacts) -> str:
    """How many parameters the model has, and how many of them were trained."""
    if facts.trained_parameters is None:
        return f"{facts.num_parameters:,} parameters"
    return f"{facts.trained_parameters:,} of {facts.num_parameters:,} parameters trained"


def _shown_base(base_model: str) -> str:
    """A Hub id as it is; of a local path the last part only, as the rest says something about the machine."""
    return base_model if _is_hub_id(base_model) else PureWindowsPath(base_model).name


def _is_hub_id(name: str | None) -> bool:
    """Whether a name could be a repository on the Hub; a local path such as ./out or /data/x could not."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None
