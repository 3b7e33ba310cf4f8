"""A tokenizer of words, a few texts, prompts and chats, and tiny models for TRL's trainers. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("trl", reason="needs the extra `trl`: pip install -e '.[trl]'")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = "the a cat dog sees hears runs sleeps fast slowly red blue big small and then . ? user assistant".split()
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' <eos> ' }}{% endgeneration %}{% else %}{{ message['content'] + ' ' }}"
    "{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", "<user>", "<assistant>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


def sentence(generator: torch.Generator, most: int = 12) -> str:
    """Some words."""
    count = int(torch.randint(4, most, (), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))


def rows(kind: str, count: int = 16, seed: int = 0) -> Dataset:
    """A data set of "text", "prompt" (and completion), or "chat"."""
    generator = torch.Generator().manual_seed(seed)

    def row() -> dict[str, Any]:
        if kind == "text":
            return {"text": sentence(generator)}
        first, second = sentence(generator), sentence(generator)
        if kind == "prompt":
            return {"prompt": first, "completion": " " + second}
        return {"messages": [{"role": "user", "content": first}, {"role": "assistant", "content": second}]}

    return Dataset.from_list([row() for _ in range(count)])


def preferences(count: int = 16, seed: int = 0) -> Dataset:
    """Prompts with a chosen and a rejected answer."""
    generator = torch.Generator().manual_seed(seed)
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_list([{name: f" {sentence(generator)}" for name in names} for _ in range(count)])


def tiny() -> LlamaForCausalLM:
    """Always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(WORDS) + 5,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
        return LlamaForCausalLM(config)


def options(folder: Any, **more: Any) -> dict[str, Any]:
    """Of a short run, for either trainer."""
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "max_length": 32,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "seed": 3,
    }
    return {**common, **more}
