"""Pretrains a causal language model from scratch, or continues a checkpoint, with delayed gradients.

    python recipes/pretrain_lm.py                                   # offline default, a minute and a half on two CPU cores
    python recipes/pretrain_lm.py --model_type qwen3                # the same with another architecture
    python recipes/pretrain_lm.py --model_type transfo-xl           # with a Transformer-XL and its memory
    python recipes/pretrain_lm.py --config recipes/configs/gpt2_small_4gpu.yaml --train_file text.txt
    python recipes/pretrain_lm.py --config recipes/configs/enwik8_transfo_xl.yaml --smoke    # a minute of it on CPU

Writes model, tokenizer, model card, timeline and a sample of generated text to `output_dir`. A model with memory, and
every model on prepared streams (data_dir) or with `columns`, reads the text in order, in contiguous columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from architectures import default_config, make, positions_of, sizes, small_model
from common import (
    CORPUS_BYTES,
    VALIDATION_SHARE,
    OptionError,
    busy_rows,
    check_vocabulary,
    choose_timeline,
    final_loss,
    measure_speed,
    parse_options,
    print_table,
    read_overrides,
    run_recipe,
    sample,
    say,
    train_or_resume,
    whole_model,
)
from lm_data import make_examples, make_tokenizer, read_source
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_ouroboros import AutoStagedModelForCausalLM, OuroborosArguments, OuroborosTrainer
from hf_ouroboros.data import ends_lines

DEFAULTS = {
    "output_dir": "runs/pretrain_lm",
    "gradient_accumulation_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 32,
    "num_train_epochs": 1.0,
    "delay_compensation": "muon+auto",  # what README recommends from scratch
    "learning_rate": 1e-2,
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
STDLIB = "Python standard library"
WIDTH, HEADS, LAYERS, DEVIATION = 96, 3, 6, 0.06  # a wider initialization shortens the first plateau
OVERRIDES = {  # of the default configuration, by model_type
    "gpt2": "n_layer=6,n_embd=96,activation_function=gelu_pytorch_tanh,n_head=3,initializer_range=0.06,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0",
    "transfo-xl": "n_layer=4,d_model=96,d_embed=96,n_head=3,d_head=32,d_inner=384,div_val=1,cutoffs=[],mem_len=64,clamp_len=128,same_length=false,dropout=0.0,init_std=0.06",
}
SMOKE = {
    "output_dir": "runs/smoke",
    "use_cpu": True,
    "bf16": False,
    "devices": ["cpu:0", "cpu:1"],
    "num_stages": 3,
    "max_steps": 20,
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "columns": 8,
    "block_size": 32,
    "max_train_bytes": 100_000,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 5,
    "report_to": "none",
    "sample_tokens": 40,
}
SMALL = {  # of a smoke test, by model_type, on top of the configuration's own overrides
    "gpt2": "n_layer=4,n_embd=32,n_head=2,n_inner=64",
    "transfo-xl": "n_layer=4,d_model=32,d_embed=32,n_head=2,d_head=16,d_inner=64,mem_len=32",
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
    data_dir: str | None = field(default=None, metadata={"help": "Streams made by prepare_lm.py."})
    text_column: str = field(default="text", metadata={"help": "Column of the text in data sets and .jsonl files."})
    validation_share: float = field(
        default=VALIDATION_SHARE, metadata={"help": "Share of the training data to hold out."}
    )
    max_train_bytes: int | None = field(
        default=None,
        metadata={"help": f"Training text in bytes. Default: all; of the standard library, {CORPUS_BYTES}."},
    )
    block_size: int = field(default=64, metadata={"help": "Tokens per sequence, or per segment of a stream."})
    eval_segment_len: int | None = field(
        default=None, metadata={"help": "Tokens per segment of the validation stream. Default: block_size."}
    )
    columns: int | None = field(
        default=None,
        metadata={
            "help": "Read the text in order, in so many contiguous columns. Default for models with memory and prepared "
            "streams: what an update reads, so that its micro-batches split the columns. Fewer: an update reads "
            "consecutive segments."
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to continue; default: a model from scratch, of model_type."}
    )
    model_type: str = field(
        default="gpt2",
        metadata={"help": "Architecture of a model from scratch: gpt2, llama, qwen3, mixtral, transfo-xl, ..."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Changes to the default configuration of model_type, for a model from scratch: name=value,... Default: "
            "a small model."
        },
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer. Default: the checkpoint's; from scratch, see vocabulary."}
    )
    vocabulary: str = field(
        default="bytes",
        metadata={
            "help": "Tokens of a model from scratch: the bytes of the text, or its words.",
            "choices": ["bytes", "words"],
        },
    )
    prompt: str = field(default="def ", metadata={"help": "Where the sample text begins."})
    sample_tokens: int = field(default=200, metadata={"help": "Length of the sample text; 0 for none."})
    record_timeline: bool = field(
        default=True, metadata={"help": "Record what each device does, in <output_dir>/timeline.json and .png."}
    )
    smoke: bool = field(
        default=False, metadata={"help": "A tiny model and little text, two CPU devices: does a configuration work?"}
    )


def make_config(script: ScriptArguments, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The configuration of a model from scratch."""
    default = default_config("model_type", script.model_type)
    values = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        # An end of line is no reason to stop writing.
        "eos_token_id": None if ends_lines(tokenizer) else tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if hasattr(default, "max_position_embeddings"):
        values[default.attribute_map.get("max_position_embeddings", "max_position_embeddings")] = script.block_size
    if script.config_overrides is not None or script.model_type in OVERRIDES:
        given = OVERRIDES[script.model_type] if script.config_overrides is None else script.config_overrides
        values |= read_overrides(given, default)
    else:
        values |= small_model(default, WIDTH, HEADS, LAYERS, DEVIATION)
    if script.smoke:
        small = SMALL.get(script.model_type)
        values |= sizes(default, 32, 2, 4) if small is None else read_overrides(small, default)
    if script.smoke and values.get("cutoffs"):  # made for a larger vocabulary
        values["cutoffs"] = [len(tokenizer) * part // 8 for part in range(1, len(values["cutoffs"]) + 1)]
    return make(default, values)


def make_model(
    script: ScriptArguments, args: OuroborosArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """A model from scratch or a checkpoint; of several processes, each makes its own stages."""
    if script.model_name_or_path:
        model = AutoStagedModelForCausalLM.from_pretrained(script.model_name_or_path, args=args, dtype="float32")
    else:
        model = AutoStagedModelForCausalLM.from_config(make_config(script, tokenizer), args=args)
    check_vocabulary(model, tokenizer)
    positions = positions_of(model.config)
    for name, length in (("block_size", script.block_size), ("eval_segment_len", script.eval_segment_len or 0)):
        if positions and length > positions:
            raise OptionError(f"{name}={length} is more than the model's {positions} positions; lower it")
    return model


def main() -> None:
    """Options, data, model, training, evaluation, results."""
    script, args = parse_options(ScriptArguments, DEFAULTS, smoke=SMOKE)
    choose_timeline(script.record_timeline, args)
    source = read_source(script)
    tokenizer = make_tokenizer(script, source)
    set_seed(args.seed)
    model = make_model(script, args, tokenizer)
    data = make_examples(script, args, source, tokenizer, has_memory=bool(getattr(model.config, "mem_len", 0)))

    trainer = OuroborosTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        data_collator=data.collator,
    )
    say(args, f"{source.description}\n{model.num_parameters():,} parameters in {trainer.stage_plan.num_stages} stages:")
    say(args, f"{trainer.stage_plan}\n")
    result = train_or_resume(trainer)
    loss = final_loss(trainer)
    trainer.save_model()
    trainer.save_state()

    # nats per token -> bits per token -> bits per character of the validation text
    bits, unit = data.tokens_per_unit / math.log(2), data.unit
    metrics = {
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss),
        f"eval_bits_per_{unit}": loss * bits,
        f"unigram_bits_per_{unit}": data.unigram_nats(len(tokenizer)) * bits,
    }
    speed = measure_speed(trainer)
    tokens_per_tick = args.per_device_train_batch_size * args.data_parallel_replicas * script.block_size
    tokens = trainer.state.num_input_tokens_seen
    rate = speed.ticks_per_second * tokens_per_tick if speed else tokens / result.metrics["train_runtime"]
    card = {
        "dataset": script.dataset_name or script.data_dir or ("local files" if script.train_file else STDLIB),
        "dataset_description": source.description,
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
        between = " " if ends_lines(tokenizer) else ""  # tokens are words
        text = script.prompt + between + sample(whole_model(trainer), tokenizer, script.prompt, script.sample_tokens)
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
    run_recipe(main)
