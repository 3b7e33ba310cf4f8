"""Does the planner foretell what a run takes? Plans on this machine's devices, runs the plan, and compares.

    python recipes/benchmark_plan.py

Every repetition measures the units of each model anew (embedding, layer, head, each alone, on all devices at once),
splits it by these times, simulates `pipelined` on the split, and then trains with exactly this split. Prints the time
of a tick as predicted and as measured. Results: OUTPUT_DIR/results.{json,md}.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from benchmark import MALLOC
from benchmarking.contenders import parse_contender
from benchmarking.job import Job, build_model
from benchmarking.launch import run
from benchmarking.options import BenchmarkArguments
from benchmarking.text import write_blocks
from transformers import HfArgumentParser

from hf_ouroboros.commands.prediction import predict
from hf_ouroboros.planning.measure import measured
from hf_ouroboros.planning.memory_model import MemoryOptions
from hf_ouroboros.planning.planner import plan_split
from hf_ouroboros.planning.unit_facts import model_facts
from hf_ouroboros.simulate.links import Links


@dataclass
class PlanBenchmarkArguments:
    """What to predict."""

    shapes: list[str] = field(
        default_factory=lambda: ["8,256,4,256", "12,128,8,128", "6,384,2,256"],
        metadata={"help": "GPT-2s and their micro-batches: layers,width,rows,tokens per row."},
    )
    devices: list[str] = field(default_factory=lambda: ["cpu:0", "cpu:1"], metadata={"help": "A core each on CPU."})
    contender: str = field(default="pipelined", metadata={"help": "pipelined, or pipelined@processes."})
    updates: int = field(default=12, metadata={"help": "Optimizer steps per run."})
    micro_batches: int = field(default=4, metadata={"help": "Micro-batches per update, M."})
    repetitions: int = field(default=3, metadata={"help": "How often every shape is planned and run."})
    output_dir: str = field(default="runs/benchmark_plan", metadata={"help": "Where results go."})


def plan_and_run(shape: str, arguments: PlanBenchmarkArguments, folder: Path) -> dict:
    """Seconds per tick of a model, predicted and measured, with the split."""
    layers, width, rows, time = (int(part) for part in shape.split(","))
    options = BenchmarkArguments(
        devices=arguments.devices,
        device_map=str(folder / "plan.json"),
        updates=arguments.updates,
        micro_batches=arguments.micro_batches,
        n_layer=layers,
        n_embd=width,
        batch_size=rows,
        block_size=time,
    )
    contender = parse_contender(
        arguments.contender, arguments.micro_batches, options.global_batch, len(options.devices)
    )
    job = Job(options, contender, 0, folder / "blocks.pt", folder, options.updates)
    write_blocks(options, job.data)
    config = build_model(job).config
    facts = model_facts(config, rows, time)
    devices = measured(config, facts, options.devices, cache=None, again=True)
    plan = plan_split(facts, devices, MemoryOptions("pipelined", arguments.micro_batches, False, "adamw"))
    Path(options.device_map).write_text(json.dumps(plan.device_map()), encoding="utf-8")
    predicted = predict(plan, "pipelined", Links()).seconds_per_tick
    found = rows * time / run(job)["tokens_per_second"]
    split = [stage.layers for stage in plan.stages]
    return {"shape": shape, "layers per stage": split, "predicted": predicted, "measured": found}


def summarize(results: list[dict], shapes: list[str]) -> str:
    """Markdown: medians, and the ratios of all repetitions."""
    lines = [
        "| layers, width, rows, tokens | layers per stage | predicted ms per tick | measured | predicted / measured |",
        "|---|---|---|---|---|",
    ]
    for shape in shapes:
        runs = [result for result in results if result["shape"] == shape]
        predicted, found = (statistics.median(r[k] for r in runs) * 1000 for k in ("predicted", "measured"))
        ratios = [r["predicted"] / r["measured"] for r in runs]
        splits = " or ".join(sorted({"-".join(map(str, r["layers per stage"])) for r in runs}))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        lines.append(f"| {shape} | {splits} | {predicted:.1f} | {found:.1f} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    """Plans and runs, shape by shape."""
    if not MALLOC.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)  # read once, when a process starts
    (arguments,) = HfArgumentParser(PlanBenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for repetition in range(arguments.repetitions):
        for shape in arguments.shapes:
            with tempfile.TemporaryDirectory() as scratch:
                results.append(plan_and_run(shape, arguments, Path(scratch)))
            print(f"repetition {repetition + 1}: {results[-1]}", flush=True)
    machine = f"{os.cpu_count()} x {platform.processor() or platform.machine()}, torch {torch.__version__}"
    text = f"{summarize(results, arguments.shapes)}\n\nMachine: {machine}. Settings: {vars(arguments)}.\n"
    (output / "results.md").write_text(text, encoding="utf-8")
    (output / "results.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
