"""Pretrains a causal language model from scratch, or continues a checkpoint, with delayed gradients.

    python recipes/pretrain_lm.py                                   # offline default, about two minutes on two CPU cores
    python recipes/pretrain_lm.py --config recipes/configs/gpt2_small_4gpu.yaml --train_file text.txt

Writes model, tokenizer, model card, timeline and a sample of generated text to `output_dir`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import (
    OptionError,
    busy_rows,
    check_vocabulary,
    choose_timeline,
    count_characters,
    final_loss,
    limit_bytes,
    measure_speed,
    parse_options,
    print_table,
    read_overrides,
    sample,
    say,
    train_or_resume,
    whole_model,
)
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from hf_ouroboros import AutoStagedModelForCausalLM, OuroborosArguments, OuroborosTrainer
from hf_ouroboros.data import PackedBlocks, byte_tokenizer, default_corpus, load_texts, pack_texts

CORPUS_BYTES = 720_000  # of the offline corpus; sets the length of the default run
DEFAULTS = {
    "output_dir": "runs/pretrain_lm",
    "gradient_accumulation_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 32,
    "num_train_epochs": 1.0,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 40,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "eval_strategy": "steps",
    "eval_steps": 0.34,
    "save_strategy": "no",
    "logging_steps": 50,
    "include_num_input_tokens_seen": True,
    "report_to": "none",
}


@dataclass
class ScriptArguments:
    """What to train on, and what model."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set of the Hub, or a local folder of one."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, e.g. wikitext-103-raw-v1."})
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Text or .jsonl files. Default: the standard library of this Python."}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Text or .jsonl files. Default: a part of the training data is held out."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text in data sets and .jsonl files."})
    validation_share: float = field(default=0.05, metadata={"help": "Share of the training data to hold out."})
    max_train_bytes: int | None = field(
        default=None,
        metadata={"help": f"Training text in bytes. Default: all; of the standard library, {CORPUS_BYTES}."},
    )
    block_size: int = field(default=64, metadata={"help": "Tokens per sequence."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to continue; default: a model from scratch, of model_type."}
    )
    model_type: str = field(default="gpt2", metadata={"help": "Architecture of a model from scratch."})
    config_overrides: str = field(
        default="n_layer=6,n_embd=96,activation_function=gelu_pytorch_tanh,n_head=3,initializer_range=0.06,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0",
        metadata={"help": "Changes to the default configuration of model_type, for a model from scratch."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer. Default: the checkpoint's; from scratch, one token per byte."}
    )
    prompt: str = field(default="def ", metadata={"help": "Where the sample text begins."})
    sample_tokens: int = field(default=200, metadata={"help": "Length of the sample text; 0 for none."})
    record_timeline: bool = field(
        default=True, metadata={"help": "Record what each device does, in <output_dir>/timeline.json and .png."}
    )


def make_model(script: ScriptArguments, args: OuroborosArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model from scratch or a checkpoint, and its tokenizer; of several processes, each makes its own stages."""
    named = script.tokenizer_name or script.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(named) if named else byte_tokenizer(script.block_size)
    if script.model_name_or_path:
        model = AutoStagedModelForCausalLM.from_pretrained(script.model_name_or_path, args=args, dtype="float32")
    else:
        config = AutoConfig.for_model(
            script.model_type,
            vocab_size=len(tokenizer),
            max_position_embeddings=script.block_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for name, value in read_overrides(script.config_overrides, config).items():
            setattr(config, name, value)
        model = AutoStagedModelForCausalLM.from_config(config, args=args)
    check_vocabulary(model, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and script.block_size > positions:
        raise OptionError(f"block_size={script.block_size} is more than the model's {positions} positions; lower it")
    return model, tokenizer


def read_texts(script: ScriptArguments) -> tuple[Iterable[str], list[str], str]:
    """Training texts, validation texts, and a description of the data."""
    if script.train_file is None and script.dataset_name is None:
        bytes_ = script.max_train_bytes or CORPUS_BYTES
        share = script.validation_share
        corpus = default_corpus(round(bytes_ / (1 - share)), share)
        described = (
            f"Source files of Python's standard library: {bytes_:,} bytes for training, other files for validation."
        )
        return corpus.train_texts, corpus.validation_texts, described
    splits = load_texts(
        script.train_file,
        script.validation_file,
        script.dataset_name,
        script.dataset_config,
        script.validation_share,
        script.text_column,
    )
    if splits.kind != "text":
        raise OptionError(
            f"train_file: pretraining needs a column {script.text_column!r}; finetune_lm.py takes prompts"
        )
    if splits.validation is None:
        raise OptionError("validation_share=0 leaves nothing to evaluate on; give a validation_file or a share")
    train = limit_bytes((row[splits.text_column] for row in splits.train), script.max_train_bytes)
    files = ", ".join(Path(name).name for name in script.train_file or [])
    return train, splits.validation[splits.text_column][:], f"Text of {script.dataset_name or files}."


def unigram_nats(train: PackedBlocks, validation: PackedBlocks, vocabulary: int) -> float:
    """Nats per validation token of a model that knows nothing but how often each token is in the training data."""
    counts = np.bincount(train.tokens.numpy(), minlength=vocabulary) + 1.0  # plus one: no token is impossible
    nats = -np.log(counts / counts.sum())
    return float(nats[validation.tokens.numpy()].mean())


def main() -> None:
    """Options, data, model, training, evaluation, results."""
    script, args = parse_options(ScriptArguments, DEFAULTS)
    choose_timeline(script.record_timeline, args)
    set_seed(args.seed)
    model, tokenizer = make_model(script, args)
    train_texts, validation_texts, description = read_texts(script)
    train = pack_texts(train_texts, tokenizer, script.block_size)
    validation = pack_texts(validation_texts, tokenizer, script.block_size)
    characters, unit = count_characters(validation_texts, tokenizer)

    trainer = OuroborosTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    say(args, f"{description}\n{model.num_parameters():,} parameters in {trainer.stage_plan.num_stages} stages:")
    say(args, f"{trainer.stage_plan}\n")
    result = train_or_resume(trainer)
    loss = final_loss(trainer)
    trainer.save_model()
    trainer.save_state()

    # nats per token -> bits per token -> bits per character of the validation text
    bits = len(validation.tokens) / characters / math.log(2)
    metrics = {
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss),
        f"eval_bits_per_{unit}": loss * bits,
        f"unigram_bits_per_{unit}": unigram_nats(train, validation, len(tokenizer)) * bits,
    }
    speed = measure_speed(trainer)
    tokens_per_tick = args.per_device_train_batch_size * args.data_parallel_replicas * script.block_size
    tokens = trainer.state.num_input_tokens_seen
    rate = speed.ticks_per_second * tokens_per_tick if speed else tokens / result.metrics["train_runtime"]
    card = {
        "dataset": script.dataset_name or ("local files" if script.train_file else "Python standard library"),
        "dataset_description": description,
        "metrics": metrics,
        "tokens_seen": tokens,
        "tokens_per_second": rate,
    }
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)

    if not args.should_save:
        return
    if script.sample_tokens:
        text = script.prompt + sample(whole_model(trainer), tokenizer, script.prompt, script.sample_tokens)
        print(f"\nSample text:\n{text}")
        Path(args.output_dir, "sample.txt").write_text(text, encoding="utf-8")
    print_table(
        f"{args.output_dir}: {trainer.state.global_step} updates, {tokens:,} tokens in "
        f"{result.metrics['train_runtime']:.0f} s",
        [
            ("validation loss (nats per token)", f"{loss:.4f}"),
            (f"bits per character (here: {unit})", f"{metrics[f'eval_bits_per_{unit}']:.3f}"),
            ("the same, by token frequency alone", f"{metrics[f'unigram_bits_per_{unit}']:.3f}"),
            ("tokens per second", f"{rate:,.0f}"),
            *busy_rows(speed),
        ],
    )


if __name__ == "__main__":
    main()
