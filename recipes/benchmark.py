"""Throughput of the schedules against the naive model-parallel Trainer: one command, one run, one table.

    python recipes/benchmark.py                          # two CPU devices, one core each
    python recipes/benchmark.py --devices cuda:0 cuda:1 --n_embd 1024 --n_layer 24 --vocab_size 50304

Every repetition runs all contenders one after the other on the same model and the same batches, so that the ratios
come from one run on one machine. Measured is the steady state: whole updates after the first ten micro-batches.
A schedule runs in one process, a thread per device; with "@processes" behind its name, a process per device.
"naive" is the stock Trainer with one device computing at a time (on CPU: one core, which is what two CPU devices that
take turns amount to; on accelerators: the model dispatched over the devices).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_ouroboros import OuroborosArguments, OuroborosTrainer
from hf_ouroboros.memory import peak_memory

SETTLING_TICKS = 10
# glibc gives freed memory back to the system and has it zeroed again when it is needed next: for all contenders alike, off.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


@dataclass
class BenchmarkArguments:
    """What to measure."""

    contenders: list[str] = field(
        default_factory=lambda: ["naive", "pipelined@processes", "pipelined", "lockstep@processes", "lockstep", "1f1b"],
        metadata={"help": "naive, schedules, and schedules@processes, in the order in which they run."},
    )
    devices: list[str] = field(
        default_factory=lambda: ["cpu:0", "cpu:1"], metadata={"help": "Devices of the pipeline."}
    )
    device_map: str = field(default="auto", metadata={"help": "Split, as in OuroborosArguments."})
    repetitions: int = field(default=3, metadata={"help": "How often all contenders run."})
    updates: int = field(default=16, metadata={"help": "Optimizer steps per run."})
    micro_batches: int = field(default=4, metadata={"help": "Micro-batches per update, M."})
    batch_size: int = field(default=4, metadata={"help": "Rows per micro-batch."})
    block_size: int = field(default=256, metadata={"help": "Tokens per row."})
    n_embd: int = field(default=256, metadata={"help": "Width of the GPT-2."})
    n_layer: int = field(default=8, metadata={"help": "Layers of the GPT-2."})
    vocab_size: int = field(default=257, metadata={"help": "Vocabulary of the GPT-2."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and data."})
    output_dir: str = field(default="runs/benchmark", metadata={"help": "Where results and timelines go."})
    part_of: str | None = field(
        default=None, metadata={"help": "Used by the benchmark itself: this is one process of that contender."}
    )


class RandomBlocks(Dataset):
    """Random tokens: throughput does not depend on what they say."""

    def __init__(self, rows: int, length: int, vocab_size: int):
        self.tokens = torch.randint(vocab_size, (rows, length))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class StepClock(TrainerCallback):
    """Remembers when every update ended, and how much memory the process then had."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.memory: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer after every update."""
        self.times.append(time.perf_counter())
        self.memory.append(psutil.Process().memory_info().rss)


def build_model(options: BenchmarkArguments) -> GPT2LMHeadModel:
    """The same GPT-2 for every contender, without dropout."""
    set_seed(options.seed)
    config = GPT2Config(
        vocab_size=options.vocab_size,
        n_positions=options.block_size,
        n_embd=options.n_embd,
        n_layer=options.n_layer,
        n_head=max(1, options.n_embd // 64),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def launch(contender: str, options: BenchmarkArguments) -> dict[str, Any]:
    """One training run with a process per device."""
    with tempfile.TemporaryDirectory() as folder:
        given = {**vars(options), "part_of": contender, "output_dir": folder}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={len(options.devices)}", __file__]
        for name, value in given.items():
            command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{contender} failed:\n{done.stderr}")
        for file in Path(folder).glob("timeline*"):
            file.replace(Path(options.output_dir) / file.name)
        return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))


def run(contender: str, options: BenchmarkArguments, threads: int) -> dict[str, Any]:
    """One training run; tokens per second in the steady state, and where the time went."""
    schedule = contender.partition("@")[0]
    model = build_model(options)
    rows = options.updates * options.micro_batches * options.batch_size
    data = RandomBlocks(rows, options.block_size, options.vocab_size)
    clock = StepClock()
    on_cpu = options.devices[0].startswith("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        common: dict[str, Any] = {
            "output_dir": scratch,
            "per_device_train_batch_size": options.batch_size,
            "gradient_accumulation_steps": options.micro_batches,
            "max_steps": options.updates,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": on_cpu,
            "disable_tqdm": True,
            "seed": options.seed,
        }
        if contender == "naive":
            if on_cpu:
                torch.set_num_threads(1)
            else:
                model = dispatch(model, options)
            model.loss_type = "ForCausalLM"
            trainer = Trainer(model=model, args=TrainingArguments(**common), train_dataset=data, callbacks=[clock])
        else:
            torch.set_num_threads(threads)
            timeline = Path(options.output_dir) / f"timeline-{contender}" if schedule != "reference" else None
            args = OuroborosArguments(
                **common,
                schedule=schedule,
                devices=options.devices,
                device_map=options.device_map,
                timeline=str(timeline) if timeline else None,
            )
            trainer = OuroborosTrainer(model=model, args=args, train_dataset=data, callbacks=[clock])
        start = time.perf_counter()
        trainer.train()
    peaks: list[Any] = [peak_memory().peak_resident / 2**20]
    if torch.distributed.is_initialized():
        peaks *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(peaks, peaks[0])
    first = -(-SETTLING_TICKS // options.micro_batches)
    tokens = options.batch_size * options.block_size * options.micro_batches
    # The last update waits for the pipeline to empty, so the steady state ends one update earlier.
    seconds = clock.times[-2] - clock.times[first]
    result: dict[str, Any] = {
        "contender": contender,
        "tokens_per_second": tokens * (options.updates - 2 - first) / seconds,
        "cold_start_seconds": clock.times[first] - start,
        "peak_memory_mib": peaks,
        "memory_growth_mib": (clock.memory[-2] - clock.memory[options.updates // 2]) / 2**20,
    }
    if contender not in ("naive", "reference"):
        recorded = trainer.timeline
        interval = recorded.steady_interval(SETTLING_TICKS, multiple_of=options.micro_batches)
        result["busy_shares"] = recorded.busy_shares(*interval)
        result["stage_plan"] = str(trainer.stage_plan)
    return result


def dispatch(model: GPT2LMHeadModel, options: BenchmarkArguments) -> GPT2LMHeadModel:
    """The naive way on accelerators: parts on several devices, one of them computing at a time."""
    from accelerate import dispatch_model

    from hf_ouroboros import split_model

    plan = split_model(model, options.devices, options.device_map, check=False).plan
    return dispatch_model(model, {name: torch.device(d).index for name, d in plan.device_map().items()})


def summarize(results: list[list[dict[str, Any]]], options: BenchmarkArguments) -> str:
    """Markdown table: median and spread over the repetitions, ratios within each repetition."""
    lines = [
        "| contender | tokens/s | speed-up over naive (min - max) | share of ideal | devices busy "
        "| kernels slower side by side | peak MiB per process |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, contender in enumerate(options.contenders):
        runs = [repetition[i] for repetition in results]
        speed = statistics.median(r["tokens_per_second"] for r in runs)
        cells = [contender, f"{speed:,.0f}", "-", "-", "-", "-"]
        if "naive" in options.contenders:
            base = options.contenders.index("naive")
            ratios = [
                r["tokens_per_second"] / rep[base]["tokens_per_second"] for r, rep in zip(runs, results, strict=True)
            ]
            cells[2] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            cells[3] = f"{statistics.median(ratios) / len(options.devices):.0%}" if contender != "naive" else "-"
            if "busy_shares" in runs[0]:
                # speed-up = (sum of busy shares) / (time of a kernel beside the others / time of a kernel alone)
                slower = [sum(r["busy_shares"]) / ratio for r, ratio in zip(runs, ratios, strict=True)]
                cells[5] = f"{statistics.median(slower) - 1:+.1%}"
        if "busy_shares" in runs[0]:
            shares = [statistics.median(r["busy_shares"][d] for r in runs) for d in range(len(runs[0]["busy_shares"]))]
            cells[4] = ", ".join(f"{share:.1%}" for share in shares)
        # One process runs all repetitions of the others and remembers the largest.
        peaks = [max(r["peak_memory_mib"][d] for r in runs) for d in range(len(runs[0]["peak_memory_mib"]))]
        cells.append(", ".join(f"{peak:,.0f}" for peak in peaks) if "@" in contender else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything and writes results.json and results.md."""
    if not MALLOC.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)  # read once, when a process starts
    (options,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    if options.part_of is not None:
        result = run(options.part_of, options, threads=1)
        if int(os.environ["RANK"]) == 0:
            (Path(options.output_dir) / "result.json").write_text(json.dumps(result))
        return
    least = -(-SETTLING_TICKS // options.micro_batches) + 4
    if options.updates < least:
        raise SystemExit(
            f"--updates {options.updates} leaves no steady state after {SETTLING_TICKS} ticks; use {least} or more"
        )
    threads = torch.get_num_threads()
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for repetition in range(options.repetitions):
        results.append([])
        for contender in options.contenders:
            result = launch(contender, options) if "@" in contender else run(contender, options, threads)
            results[-1].append(result)
            print(
                f"repetition {repetition + 1}: {contender:<20} {result['tokens_per_second']:10,.0f} tokens/s",
                flush=True,
            )
    machine = (
        f"{os.cpu_count()} x {platform.processor() or platform.machine()}, torch {torch.__version__}, {threads} threads"
    )
    table = summarize(results, options)
    settings = ", ".join(f"{k}={v}" for k, v in vars(options).items() if k not in ("contenders", "output_dir"))
    text = f"{table}\n\nMachine: {machine}. Settings: {settings}.\n"
    (output / "results.md").write_text(text, encoding="utf-8")
    (output / "results.json").write_text(
        json.dumps({"machine": machine, "options": vars(options), "results": results}, indent=1)
    )
    for result in results[0]:
        if "stage_plan" in result:
            print(f"\n{result['stage_plan']}\n")
            break
    print(text)


if __name__ == "__main__":
    sys.exit(main())
