"""Tunes a causal language model on conversations, with TRL's SFTTrainer over stages and LoRA adapters.

    python recipes/chat_lm.py                                      # chats with the default run of pretrain_lm.py
    python recipes/chat_lm.py --model_name_or_path Qwen/Qwen3-0.6B --chat talks.jsonl --lora_rank 16
    python recipes/chat_lm.py --quantization nf4                   # on matrices of 4 bits (QLoRA)

Rows of the .jsonl file have `messages`, a list of {"role": "user" | "assistant" | "system", "content": text}; only what the
assistant says counts in the loss, where the tokenizer's chat template marks it. A tokenizer without a template gets one. Without data it
asks for what functions of Python's standard library do, and answers with their documentation. Writes the adapters, tokenizer,
model card and a sample answer to `output_dir`. Needs the extra `trl`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters import packing, with_lora
from architectures import positions_of
from common import (
    OptionError,
    busy_rows,
    check_vocabulary,
    measure_speed,
    parse_options,
    print_table,
    run_recipe,
    say,
    train_or_resume,
)
from finetune_lm import DEFAULT_MODEL, check_model_is_there, show_completion, stdlib_pairs
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from hf_ouroboros import AutoStagedModelForCausalLM
from hf_ouroboros.data import default_corpus

DEFAULTS = {
    "output_dir": "runs/chat_lm",
    "delay_compensation": "auto",
    "gradient_accumulation_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 4.0,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "weight_decay": 0.0,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 20,
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "assistant_only_loss": True,
}
# Roles in lines of their own; what the assistant says is marked for the loss, and ends with the end of the text.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass
class ScriptArguments:
    """What to tune, and on which conversations."""

    model_name_or_path: str = field(
        default=DEFAULT_MODEL, metadata={"help": "Checkpoint, a folder or a name on the Hub."}
    )
    chat: str | None = field(
        default=None, metadata={"help": ".jsonl file of `messages`. Default: made from the standard library."}
    )
    validation_share: float = field(default=0.1, metadata={"help": "Share of the conversations to hold out."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters on all linear modules of the layers."})
    quantization: str | None = field(
        default=None, metadata={"help": "Pack the matrices below the adapters: nf4 or int8 (needs the extra `bnb`)."}
    )
    sample_tokens: int = field(default=60, metadata={"help": "Length of the sample answer; 0 for none."})


def stdlib_chats(count: int, longest: int) -> list[dict[str, Any]]:
    """Up to `count` conversations about functions of Python's standard library, none longer than so many bytes."""
    chats = []
    for pair in stdlib_pairs(default_corpus(4_000_000, 0.15).train, 10**6):
        question, answer = pair["prompt"].removesuffix(': """'), pair["completion"].removesuffix('"""')
        if len(f"user: {question}\nassistant: {answer}".encode()) < longest:
            chats.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return [{"messages": messages} for messages in chats[:: max(1, len(chats) // count)][:count]]


def read_chats(script: ScriptArguments, longest: int) -> tuple[Any, Any, str]:
    """Conversations to train on and to hold out, and a description; those made here are not longer than so many bytes.

    Raises:
        OptionError: no such file, or rows without messages, or too few of them.
    """
    from datasets import Dataset, load_dataset

    if script.chat is None:
        data = Dataset.from_list(stdlib_chats(480, longest))
        described = "Questions for functions of Python's standard library, answered with their documentation."
    else:
        if not Path(script.chat).is_file():
            raise OptionError(f"chat={script.chat!r} does not exist; give a .jsonl file of messages")
        try:
            data = load_dataset("json", data_files=script.chat, split="train")
        except Exception as error:  # whatever a file that is no JSON ends in
            raise OptionError(f"chat={script.chat!r} is no .jsonl file of messages ({type(error).__name__})") from error
        described = f"Conversations of {Path(script.chat).name}."
    if "messages" not in data.column_names:
        raise OptionError(f"chat={script.chat!r} has the columns {data.column_names}, but no messages")
    held = int(len(data) * script.validation_share)
    if not 0 < held < len(data):
        raise OptionError(
            f"validation_share={script.validation_share} of {len(data)} conversations leaves a part empty"
        )
    parts = data.train_test_split(test_size=held, seed=0)
    return parts["train"], parts["test"], described


def asked(tokenizer: PreTrainedTokenizerBase, chat: dict[str, Any]) -> str:
    """A conversation up to the assistant's last answer, as the model reads it."""
    messages = chat["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return tokenizer.apply_chat_template(messages[:last], tokenize=False, add_generation_prompt=True)


def main() -> None:
    """Options, model, data, training, results."""
    try:
        from hf_ouroboros.trl import OuroborosSFTConfig, OuroborosSFTTrainer
    except ImportError:
        raise OptionError("conversations need TRL: pip install -e '.[trl,recipes]'") from None
    script, args = parse_options(ScriptArguments, DEFAULTS, arguments_class=OuroborosSFTConfig)
    set_seed(args.seed)
    check_model_is_there(script.model_name_or_path)
    if script.lora_rank < 1:
        raise OptionError(f"lora_rank={script.lora_rank} must be at least 1: adapters are what is trained here")
    packed = packing(script.quantization, script.lora_rank, args.bf16)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    if "generation" not in str(tokenizer.chat_template):
        args.assistant_only_loss = False
        say(args, "The chat template does not mark what the assistant says, so whole conversations count in the loss.")
    model = AutoStagedModelForCausalLM.from_pretrained(
        script.model_name_or_path, args=args, frozen=True, dtype="float32", **packed
    )
    check_vocabulary(model, tokenizer)
    positions = positions_of(model.config) or 1024
    args.max_length = min(args.max_length or 1024, positions)
    train, validation, description = read_chats(script, args.max_length)
    trainer = OuroborosSFTTrainer(
        model=with_lora(model, script.lora_rank),
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    say(args, f"{description}\n{len(train):,} training and {len(validation):,} validation conversations.")
    say(args, f"{trainer.stage_plan}\n")
    before = trainer.evaluate()
    train_or_resume(trainer)
    after = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    if not args.should_save:
        return
    if script.sample_tokens:
        title = "A conversation of the validation data, and after >>> what the model answers"
        show_completion(trainer, script, tokenizer, asked(tokenizer, validation[0]), title)
    print_table(
        f"{args.output_dir}: {trainer.state.global_step} updates, before -> after",
        [
            ("validation loss (nats per token)", f"{before['eval_loss']:.4f} -> {after['eval_loss']:.4f}"),
            *busy_rows(measure_speed(trainer)),
        ],
    )


if __name__ == "__main__":
    run_recipe(main)
