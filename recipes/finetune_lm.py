"""Fine-tunes a causal language model on text, or on completions of prompts, with delayed gradients.

    python recipes/finetune_lm.py                                    # continues the default run of pretrain_lm.py
    python recipes/finetune_lm.py --model_name_or_path Qwen/Qwen3-0.6B-Base --train_file pairs.jsonl
    python recipes/finetune_lm.py --lora_rank 16                     # trains LoRA adapters only
    python recipes/finetune_lm.py --lora_rank 16 --quantization nf4  # on matrices of 4 bits (QLoRA)
    python recipes/finetune_lm.py --chat talks.jsonl                 # conversations: chat_lm.py, with its options

Rows of a .jsonl file have a `text`, or a `prompt` and a `completion`; then only completions count in the loss. Without
data it makes pairs from Python's standard library: a function's name, and the first line of its documentation.
Writes the best model by validation loss, tokenizer, model card and a sample to `output_dir`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters import packing, with_lora
from architectures import positions_of
from common import (
    OptionError,
    busy_rows,
    check_vocabulary,
    choose_timeline,
    measure_speed,
    parse_options,
    print_table,
    run_recipe,
    sample,
    say,
    train_or_resume,
    whole_model,
)
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_ouroboros import AutoStagedModelForCausalLM, OuroborosTrainer
from hf_ouroboros.data import CompletionCollator, CompletionDataset, Document, default_corpus, load_texts, pack_texts
from hf_ouroboros.metrics.causal_lm import compute_metrics, preprocess_logits_for_metrics

DEFAULT_MODEL = "runs/pretrain_lm"
DEFAULTS = {
    "output_dir": "runs/finetune_lm",
    "delay_compensation": "auto",  # what README recommends for fine-tuning, by K and M
    "gradient_accumulation_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 3.0,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "weight_decay": 0.01,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "logging_steps": 20,
    "report_to": "none",
}


@dataclass
class ScriptArguments:
    """What to fine-tune, and on what."""

    model_name_or_path: str = field(
        default=DEFAULT_MODEL, metadata={"help": "Checkpoint, a folder or a name on the Hub."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer. Default: the checkpoint's."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set of the Hub, or a local folder of one."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Text or .jsonl files. Default: pairs made from the standard library."}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Text or .jsonl files. Default: a part of the training data is held out."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text, where rows are texts."})
    validation_share: float = field(default=0.1, metadata={"help": "Share of the training data to hold out."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of the longest sequence. Default: what the model takes, at most 1024."}
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Use only the first so many rows."})
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train LoRA adapters of this rank on all linear modules of the layers, and nothing else (needs "
            "the extra `peft`). Default: the whole model."
        },
    )
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "Pack the matrices below the adapters: nf4 (with double quantization) or int8 (needs the extra `bnb`). "
            "Default: as they are."
        },
    )
    sample_tokens: int = field(default=80, metadata={"help": "Length of the sample completion; 0 for none."})
    record_timeline: bool = field(
        default=True, metadata={"help": "Record what each device does, in <output_dir>/timeline.json and .png."}
    )


def stdlib_pairs(documents: Iterable[Document], count: int) -> list[dict[str, str]]:
    """Up to `count` pairs of at most 60 characters: a function's name, and the first line of its documentation."""
    pairs = []
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except SyntaxError:  # the last file of the corpus may be cut
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                summary = (ast.get_docstring(node) or "").split("\n")[0].strip()
                prompt, completion = f'def {node.name}: """', f'{summary}"""'
                if summary and len(prompt) + len(completion) <= 60:
                    pairs.append({"prompt": prompt, "completion": completion})
    return pairs[:: max(1, len(pairs) // count)][:count]


def read_datasets(
    script: ScriptArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, Dataset, dict[str, str] | None, str]:
    """Training and validation data, a validation pair to show (None where rows are texts), and a description."""
    if script.train_file is None and script.dataset_name is None:
        corpus, count = default_corpus(4_000_000, 0.15), script.max_train_examples or 480
        kind, train, validation = "completion", stdlib_pairs(corpus.train, count), stdlib_pairs(corpus.validation, 60)
        described = (
            "Names of functions of Python's standard library, completed by the first line of their documentation."
        )
    else:
        options = script.train_file, script.validation_file, script.dataset_name, script.dataset_config
        splits = load_texts(*options, script.validation_share, script.text_column)
        if splits.validation is None:
            raise OptionError("validation_share=0 leaves nothing to choose the best model by; give a validation_file")
        kind, train, validation = splits.kind, splits.train, splits.validation
        if script.max_train_examples is not None:
            train = train.select(range(min(script.max_train_examples, len(train))))
        files = ", ".join(Path(name).name for name in script.train_file or [])
        described = (
            f"{'Pairs of prompt and completion' if kind == 'completion' else 'Text'} of {script.dataset_name or files}."
        )
    if kind == "text":
        packed = [
            pack_texts(rows, tokenizer, max_length, text_column=script.text_column) for rows in (train, validation)
        ]
        return *packed, None, described
    made = [CompletionDataset(rows, tokenizer, max_length, on_empty="drop") for rows in (train, validation)]
    return *made, validation[0], described


def tuned_model(trainer: OuroborosTrainer, script: ScriptArguments) -> Any:
    """The trained model in one piece."""
    if script.lora_rank is None or trainer.args.world_size == 1:
        return whole_model(trainer)
    from peft import PeftModel

    packed = packing(script.quantization, script.lora_rank, trainer.args.bf16)
    base = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype="float32", **packed)
    return PeftModel.from_pretrained(base, trainer.args.output_dir)


def check_model_is_there(name: str) -> None:
    """Raises OptionError if the default model has not been made yet, or not to its end."""
    if name == DEFAULT_MODEL and not Path(name, "config.json").is_file():
        found = (
            "holds no model: the run that was to write it has not ended" if Path(name).is_dir() else "does not exist"
        )
        raise OptionError(
            f"model_name_or_path={DEFAULT_MODEL!r} {found}; run recipes/pretrain_lm.py first, or name a checkpoint"
        )


def show_completion(trainer: OuroborosTrainer, script: Any, tokenizer: Any, prompt: str, title: str) -> None:
    """Prints a prompt and what the trained model makes of it, and writes both to `sample.txt`."""
    completion = sample(tuned_model(trainer, script), tokenizer, prompt, script.sample_tokens, greedy=True)
    text = f"{prompt}>>>{completion}"
    print(f"\n{title}:\n{text}")
    Path(trainer.args.output_dir, "sample.txt").write_text(text, encoding="utf-8")


def main() -> None:
    """Options, model, data, training with the best model kept, results."""
    if any(word.partition("=")[0] == "--chat" for word in sys.argv[1:]):
        from chat_lm import main as tune_on_conversations  # which imports this file

        tune_on_conversations()
        return
    script, args = parse_options(ScriptArguments, DEFAULTS)
    choose_timeline(script.record_timeline, args)
    set_seed(args.seed)
    local = Path(script.model_name_or_path)
    check_model_is_there(script.model_name_or_path)
    packed = packing(script.quantization, script.lora_rank, args.bf16)
    tokenizer = AutoTokenizer.from_pretrained(script.tokenizer_name or script.model_name_or_path)
    model = AutoStagedModelForCausalLM.from_pretrained(
        script.model_name_or_path, args=args, frozen=script.lora_rank is not None, dtype="float32", **packed
    )
    check_vocabulary(model, tokenizer)
    positions = positions_of(model.config) or 1024
    if script.max_length is not None and script.max_length > positions:
        raise OptionError(f"max_length={script.max_length} is more than the model's {positions} positions; lower it")
    train, validation, shown, description = read_datasets(script, tokenizer, script.max_length or min(positions, 1024))

    if script.lora_rank is not None:
        model = with_lora(model, script.lora_rank)
    trainer = OuroborosTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=CompletionCollator(tokenizer),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )
    say(args, f"{description}\n{len(train):,} training and {len(validation):,} validation examples.")
    say(args, f"{trainer.stage_plan}\n")
    before = trainer.evaluate()
    train_or_resume(trainer)
    after = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()

    kept = ("eval_loss", "eval_perplexity", "eval_token_accuracy")
    card = {
        "dataset": Path(
            script.dataset_name or ("local files" if script.train_file else "Python standard library")
        ).name,
        "dataset_description": description,
        "finetuned_from": None if local.is_dir() else script.model_name_or_path,
        "metrics": {name: after[name] for name in kept},
    }
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)

    if not args.should_save:
        return
    if shown and script.sample_tokens:
        title = "A prompt of the validation data, and after >>> what the model makes of it"
        show_completion(trainer, script, tokenizer, shown["prompt"], title)
    print_table(
        f"{args.output_dir}: {trainer.state.global_step} updates, before -> after",
        [
            ("validation loss (nats per token)", f"{before['eval_loss']:.4f} -> {after['eval_loss']:.4f}"),
            ("token accuracy", f"{before['eval_token_accuracy']:.1%} -> {after['eval_token_accuracy']:.1%}"),
            ("best checkpoint", Path(trainer.state.best_model_checkpoint or "none").name),
            *busy_rows(measure_speed(trainer)),
        ],
    )


if __name__ == "__main__":
    run_recipe(main)
