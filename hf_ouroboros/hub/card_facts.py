"""From a trainer to the facts of its model card."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import is_adapted
from ..partition.meta import is_encoder_decoder
from ..partition.packed import sizes
from ..simulate.timeline import timeline_files
from ..user_files import output_folder
from .card import TAG, CardFacts

if TYPE_CHECKING:
    from ..hooks.interfaces import SplitTrainer

_HYPERPARAMETERS = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "label_smoothing_factor",
    "bf16",
    "fp16",
)

__all__ = ["TAG", "collect_facts"]


def collect_facts(trainer: SplitTrainer, **given: Any) -> CardFacts:
    """What the trainer knows about its run; `given` fields of CardFacts that are not None win.

    The timeline picture, where there is one, is copied beside the card.
    """
    args, plan, model = trainer.options, trainer.stage_plan, trainer.model
    history = trainer.state.log_history
    summary = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    evaluation = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    skipped = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    output = output_folder(args)
    trained = sum(row.parameters - row.frozen for row in plan.rows)
    facts: dict[str, Any] = {
        "model_name": trainer.hub_model_id or output.absolute().name,
        "repo_id": trainer.hub_model_id,
        "model_type": model.config.model_type,
        "encoder_decoder": is_encoder_decoder(trainer._partition.model),  # within what may be wrapped around it
        "num_parameters": sum(size.elements for size in sizes(model.parameters(), model).values()),
        "schedule": args.schedule,
        "num_stages": plan.num_stages,
        "devices": list(plan.devices),
        "split_reason": plan.reason,
        "stages": [
            {
                "stage": row.stage,
                "device": row.device,
                "layers": row.layers,
                "parameters": row.parameters,
                "delay": row.delay,
            }
            for row in plan.rows
        ],
        "micro_batches_per_update": args.gradient_accumulation_steps,
        "tied_gradient": args.tied_gradient if plan.tied else None,
        "delay_warmup_steps": args.delay_warmup_steps,
        "clip_scope": args.clip_scope if args.max_grad_norm else None,
        "recompute": args.recompute,
        "weights": args.weights,
        "delay_compensation": str(trainer.delay_compensation),
        "delay_compensation_args": trainer.delay_compensation.options,
        "hyperparameters": {name: _plain(getattr(args, name, None)) for name in _HYPERPARAMETERS},
        "base_model": _base_model(model.config),
        "metrics": {k: v for k, v in evaluation.items() if k.startswith("eval_") and k not in skipped},
        "log_history": history,
        "seed": args.seed,
        "versions": {name: version(name) for name in ("hf_ouroboros", "torch", "transformers")},
        "timeline_picture": _picture(args.timeline, output),
        "train_runtime": summary.get("train_runtime"),
        "tokens_seen": trainer.state.num_input_tokens_seen or None,
        "tokenizer": trainer.processing_class is not None,
        "adapter": _adapter(model),
        "trained_parameters": trained if any(row.frozen for row in plan.rows) else None,
    }
    for name, value in given.items():
        if value is not None:
            facts[name] = value
    if isinstance(facts.get("tags"), str):
        facts["tags"] = [facts["tags"]]
    for name in ("dataset_id", "dataset_name"):
        if isinstance(facts.get(name), (list, tuple)):
            facts[name] = ", ".join(facts[name])
    return CardFacts(**facts)


def _plain(value: Any) -> Any:
    """Enum members by their value."""
    return getattr(value, "value", value)


def _base_model(config: Any) -> str | None:
    """Where the weights came from; a folder of this machine is nobody else's business."""
    name = getattr(config, "_name_or_path", "") or ""
    return name if name and not os.path.exists(name) and not os.path.isabs(name) else None


def _adapter(model: Any) -> str | None:
    """The kind of the active adapter."""
    return str(model.active_peft_config.peft_type.value) if is_adapted(model) else None


def _picture(timeline: str | None, output: Path) -> str | None:
    if timeline is None:
        return None
    source = timeline_files(timeline)[1]
    if not source.is_file():
        return None
    target = output / "timeline.png"
    if source.resolve() != target.resolve():
        output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target.name
