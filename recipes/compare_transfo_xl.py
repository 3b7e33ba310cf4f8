"""Does memory help? A small Transformer-XL against a GPT-2 of its size, on the same tokens in the same order.

    python recipes/prepare_lm.py --corpus enwik8 --source enwik8_part --output_dir data/enwik8_part
    python recipes/compare_transfo_xl.py --data_dir data/enwik8_part

Every contender reads the training stream once from its start, in contiguous columns, with the same optimizer, and is
then measured on the same validation tokens: with memory (GPT-2: half of its window is context that it reads once more),
and without. Every run leaves a JSON file; runs that have one are not repeated. Prints a Markdown table.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import OptionError, stdlib_corpus
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, PreTrainedModel, set_seed
from transformers.utils import logging

from hf_ouroboros import OuroborosArguments, OuroborosTrainer
from hf_ouroboros.data import BYTE_VOCAB_SIZE, StreamCollator, StreamSegments, byte_tokenizer, text_stream
from hf_ouroboros.data.prepared import PreparedStreams, TextUnits
from hf_ouroboros.data.tokenizing import TokenArray
from hf_ouroboros.metrics.stream_loss import stream_loss
from hf_ouroboros.models.transfo_xl import TransfoXLConfig, TransfoXLLMHeadModel

INIT_STD = 0.05  # wider than usual, for all: it shortens the first plateau of a small model
CONTENDERS = ("transfo-xl", "transfo-xl trained without memory", "gpt2")


@dataclass
class ScriptArguments:
    """What to compare, on what."""

    data_dir: str | None = field(
        default=None, metadata={"help": "Streams of bytes made by prepare_lm.py. Default: Python's standard library."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run per seed and contender."})
    contenders: list[str] = field(
        default_factory=lambda: list(CONTENDERS), metadata={"help": "Which models.", "choices": list(CONTENDERS)}
    )
    updates: int = field(default=1500, metadata={"help": "Optimizer steps of columns x segment_len tokens."})
    columns: int = field(default=16, metadata={"help": "Columns of the training stream."})
    segment_len: int = field(default=64, metadata={"help": "Tokens per segment; GPT-2's positions."})
    mem_len: int = field(default=64, metadata={"help": "Rows of memory, in training."})
    eval_mem_len: int = field(default=256, metadata={"help": "Rows of memory at validation."})
    n_layer: int = field(default=4, metadata={"help": "Layers."})
    width: int = field(default=128, metadata={"help": "Width of the hidden state."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Of AdamW, after warming up over a tenth of the run."})
    validation_tokens: int = field(default=100_000, metadata={"help": "How many of them to read."})
    output_dir: str = field(default="runs/compare_transfo_xl", metadata={"help": "Where results go."})


def build_model(contender: str, script: ScriptArguments) -> PreTrainedModel:
    """A model without dropout. 12 width^2 weights per layer: the Transformer-XL's projection of positions has width^2
    of them, which its feed-forward layers do without."""
    heads = script.width // 32
    if contender == "gpt2":
        config = GPT2Config(
            vocab_size=BYTE_VOCAB_SIZE,
            n_positions=script.segment_len,
            n_embd=script.width,
            n_layer=script.n_layer,
            n_head=heads,
            initializer_range=INIT_STD,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=256,
            eos_token_id=256,
        )
        return GPT2LMHeadModel(config)
    config = TransfoXLConfig(
        vocab_size=BYTE_VOCAB_SIZE,
        cutoffs=[],
        div_val=1,
        d_model=script.width,
        d_embed=script.width,
        n_head=heads,
        d_head=32,
        d_inner=script.width * 7 // 2,
        n_layer=script.n_layer,
        mem_len=script.mem_len if contender == "transfo-xl" else 0,
        clamp_len=script.segment_len + script.mem_len,  # the largest distance of training
        same_length=False,
        dropout=0.0,
        init_std=INIT_STD,
        eos_token_id=256,
    )
    return TransfoXLLMHeadModel(config)


def train(contender: str, seed: int, script: ScriptArguments, tokens: TokenArray) -> PreTrainedModel:
    """The trained model; one stage, hence without delay: this is about memory alone."""
    set_seed(seed)
    model = build_model(contender, script)
    args = OuroborosArguments(
        output_dir=str(Path(script.output_dir) / "scratch"),
        devices=["cpu:0"],
        use_cpu=True,
        train_sampling_strategy="sequential",
        dataloader_drop_last=True,
        per_device_train_batch_size=script.columns,
        max_steps=script.updates,
        learning_rate=script.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=script.updates // 10,
        weight_decay=0.01,
        logging_steps=max(1, script.updates // 10),
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    data = StreamSegments(tokens, script.columns, script.segment_len)
    if data.segments < script.updates:
        raise OptionError(f"updates={script.updates} is more than the {data.segments} segments of a column; lower it")
    collator = StreamCollator(positions=contender == "transfo-xl")
    OuroborosTrainer(model=model, args=args, train_dataset=data, data_collator=collator).train()
    return model.eval()


def measure(model: PreTrainedModel, script: ScriptArguments, tokens: TokenArray) -> dict[str, float | None]:
    """Validation bits per byte with memory and without; None where the model has never seen any."""
    units = TextUnits(len(tokens), len(tokens), 1)
    length, columns = script.segment_len, 16
    off = {"segment_length": length, "columns": columns}
    if isinstance(model, GPT2LMHeadModel):
        on = {"segment_length": length // 2, "overlap": length - length // 2, "columns": columns}
    else:
        on = off if model.config.mem_len else None
    results: dict[str, float | None] = {"memory on": None}
    if on is not None:
        if on is off:
            model.config.mem_len = script.eval_mem_len
        results["memory on"] = stream_loss(model, tokens, **on).metrics(units)["bits_per_byte"]
    if not isinstance(model, GPT2LMHeadModel):
        model.config.mem_len = 0
    results["memory off"] = stream_loss(model, tokens, **off).metrics(units)["bits_per_byte"]
    return results


def read_tokens(script: ScriptArguments) -> tuple[TokenArray, TokenArray, str]:
    """Training and validation tokens, and what they are."""
    if script.data_dir is None:
        needed = (script.updates * script.segment_len + 1) * script.columns
        corpus = stdlib_corpus(needed)
        streams = (text_stream(texts, byte_tokenizer()) for texts in (corpus.train_texts, corpus.validation_texts))
        return *streams, "Python's standard library"
    prepared = PreparedStreams.load(script.data_dir)
    return prepared.split("train").tokens, prepared.split("validation").tokens, prepared.description


def run(contender: str, seed: int, script: ScriptArguments) -> dict:
    """Results of one run, from its file if it has one."""
    settings = dataclasses.asdict(script)
    for name in ("seeds", "contenders", "output_dir"):
        del settings[name]
    path = Path(script.output_dir) / f"{contender.replace(' ', '_')}-{seed}.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise OptionError(f"output_dir: {path} is of a run with other settings; remove it, or name another folder")
        return found
    tokens, validation, description = read_tokens(script)
    start = time.perf_counter()
    model = train(contender, seed, script, tokens)
    seconds = time.perf_counter() - start
    results = measure(model, script, validation[: script.validation_tokens])
    facts = {"contender": contender, "seed": seed, "parameters": model.num_parameters(), "data": description}
    found = {**facts, "seconds": seconds, **results, "settings": settings}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def summarize(results: list[dict], script: ScriptArguments) -> str:
    """Markdown: mean over the seeds, and the smallest and largest."""
    lines = [
        "| trained on the same tokens | parameters | bits per byte, memory on | memory off |",
        "|---|---|---|---|",
    ]
    for contender in script.contenders:
        runs = [result for result in results if result["contender"] == contender]
        cells = [contender, f"{runs[0]['parameters']:,}"]
        for kind in ("memory on", "memory off"):
            values = [result[kind] for result in runs]
            if None in values:
                cells.append("-")
            else:
                cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} - {max(values):.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    tokens = script.updates * script.columns * script.segment_len
    seeds = ", ".join(map(str, script.seeds))
    return "\n".join([*lines, "", f"{results[0]['data']} {tokens:,} tokens seen; seeds {seeds}: mean (min - max)."])


def main() -> None:
    """Runs what has not run yet, and prints the table."""
    (script,) = HfArgumentParser(ScriptArguments, description=__doc__).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    Path(script.output_dir).mkdir(parents=True, exist_ok=True)
    results = []
    for seed in script.seeds:
        for contender in script.contenders:
            results.append(run(contender, seed, script))
            found = {kind: results[-1][kind] for kind in ("memory on", "memory off", "seconds")}
            print(f"{contender}, seed {seed}: {found}", file=sys.stderr, flush=True)
    table = summarize(results, script)
    (Path(script.output_dir) / "results.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
