"""Perplexity and bits per character of a language model over a whole text, its memory carried from start to end.

    python recipes/evaluate_lm.py --model_name_or_path runs/pretrain_lm                      # default corpus
    python recipes/evaluate_lm.py --model_name_or_path runs/enwik8_transfo_xl --data_dir data/enwik8 --split test \
        --segment_len 80 --mem_len 2100 --clamp_len 820 --same_length true                   # as published

Every token but the first counts once, the ragged tail included. A Transformer-XL carries its memory (mem_len 0: none);
a model without memory reads mem_len tokens before each segment once more (a sliding window).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import OptionError, check_vocabulary, print_table, read_files, run_recipe, stdlib_corpus
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_ouroboros.models.transfo_xl  # noqa: F401 - the Auto classes then know it
from hf_ouroboros.data import text_stream
from hf_ouroboros.data.prepared import PreparedSplit, PreparedStreams, count_units
from hf_ouroboros.metrics.stream_loss import stream_loss

DEFAULT_SEGMENT = 128  # tokens, of a model that has neither memory nor a fixed number of positions


@dataclass
class ScriptArguments:
    """What to evaluate, on what, and how it reads."""

    model_name_or_path: str = field(
        default="runs/pretrain_lm", metadata={"help": "Model: a folder or a name on the Hub."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer. Default: the model's."})
    data_dir: str | None = field(default=None, metadata={"help": "Streams made by prepare_lm.py."})
    split: str = field(default="validation", metadata={"help": "Which of them: train, validation or test."})
    text_file: list[str] | None = field(
        default=None,
        metadata={"help": "Text files instead. Default: the part of Python's standard library that isn't trained on."},
    )
    segment_len: int | None = field(
        default=None,
        metadata={"help": "Tokens predicted at a time. Default: mem_len, or as many as fit."},
    )
    mem_len: int | None = field(
        default=None,
        metadata={"help": "Rows of memory. Default: the model's. Without memory: tokens read once more; default 0."},
    )
    clamp_len: int | None = field(
        default=None, metadata={"help": "Distances beyond count as this. Default: the model's."}
    )
    same_length: bool | None = field(
        default=None, metadata={"help": "Every position sees exactly mem_len positions. Default: the model's."}
    )
    columns: int = field(
        default=1,
        metadata={
            "help": "Rows read at a time. With memory each starts in the middle of the text with none: faster, slightly worse."
        },
    )
    dtype: str = field(default="float32", metadata={"help": "Precision.", "choices": ["float32", "bfloat16"]})
    device: str | None = field(default=None, metadata={"help": "Where to compute. Default: an accelerator, else cpu."})
    output_file: str | None = field(
        default=None, metadata={"help": "JSON file of the results. Default: evaluation.json in the model's folder."}
    )


def load_model(script: ScriptArguments) -> PreTrainedModel:
    """The model, reading as the options say."""
    config = AutoConfig.from_pretrained(script.model_name_or_path)
    reading = {"mem_len": script.mem_len, "clamp_len": script.clamp_len, "same_length": script.same_length}
    given = {name: value for name, value in reading.items() if value is not None}
    if not hasattr(config, "mem_len"):
        if others := given.keys() - {"mem_len"}:
            raise OptionError(f"{', '.join(sorted(others))}: a {config.model_type} has no memory, and no such option")
        given = {}
    device = script.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype=script.dtype, **given)
    return model.to(device).eval()


def read_stream(script: ScriptArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[PreparedSplit, str]:
    """The tokens to read, the text they stand for, and what it is."""
    if script.data_dir is not None and script.text_file is not None:
        raise OptionError("give data_dir or text_file, not both")
    if script.data_dir is not None:
        streams = PreparedStreams.load(script.data_dir)
        if AutoTokenizer.from_pretrained(script.data_dir).get_vocab() != tokenizer.get_vocab():
            raise OptionError(f"data_dir: {script.data_dir} was prepared with another vocabulary than the model's")
        return streams.split(script.split), f"{script.split} part of {streams.description}"
    if script.text_file is not None:
        texts, what = read_files("text_file", script.text_file), ", ".join(Path(name).name for name in script.text_file)
    else:
        texts, what = stdlib_corpus().validation_texts, "source files of Python's standard library"
    return PreparedSplit(text_stream(texts, tokenizer), count_units(texts)), what


def main() -> None:
    """Loads, reads, and shows the figures."""
    (script,) = HfArgumentParser(ScriptArguments, description=__doc__).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.tokenizer_name or script.model_name_or_path)
    split, what = read_stream(script, tokenizer)
    model = load_model(script)
    check_vocabulary(model, tokenizer)
    has_memory = hasattr(model.config, "mem_len")
    overlap = 0 if has_memory else script.mem_len or 0
    positions = getattr(model.config, "max_position_embeddings", None)
    fitting = model.config.mem_len if has_memory else (positions or 0) - overlap
    segment = script.segment_len or fitting or DEFAULT_SEGMENT
    if not has_memory and positions and (segment < 1 or segment + overlap > positions):
        raise OptionError(
            f"mem_len={overlap} and segment_len={max(segment, 1)} must fit into the model's {positions} positions together"
        )
    found = stream_loss(model, split.tokens, segment, overlap, script.columns)
    metrics = found.metrics(split.units)
    reading = {"segment_len": segment, "columns": script.columns, "mem_len": overlap}
    if has_memory:
        reading |= {name: getattr(model.config, name) for name in ("mem_len", "clamp_len", "same_length")}
    results = {
        "model": script.model_name_or_path,
        "data": what,
        "targets": found.targets,
        **dataclasses.asdict(split.units),
        **metrics,
        **reading,
    }
    default = Path(script.model_name_or_path) if Path(script.model_name_or_path).is_dir() else Path("runs")
    path = Path(script.output_file or default / "evaluation.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(
        f"{script.model_name_or_path} on {what}",
        [
            ("predicted tokens", f"{found.targets:,}"),
            ("loss (nats per token)", f"{metrics['loss']:.4f}"),
            ("perplexity per token", f"{metrics['perplexity']:,.3f}"),
            ("bits per byte", f"{metrics['bits_per_byte']:.4f}"),
            ("bits per character", f"{metrics['bits_per_character']:.4f}"),
            ("perplexity per word", f"{metrics['word_perplexity']:.5g}"),
            ("read", ", ".join(f"{name} {value}" for name, value in reading.items())),
        ],
    )


if __name__ == "__main__":
    run_recipe(main)
