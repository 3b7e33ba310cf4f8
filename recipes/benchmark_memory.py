"""Does the planner foretell what a run needs? Plans models, trains them over processes, and compares how large each became.

    python recipes/benchmark_memory.py

Each process is measured by the growth of its resident size: from after the imports and a run with a tiny model of as many
layers, before anything of the model is made, to its peak in training. The allocator of the processes gives freed memory back at
once, so that nothing is counted which nobody holds. Results: OUTPUT_DIR/results.{json,md}.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarking import memory
from benchmarking.contenders import parse_contender
from benchmarking.job import Job
from benchmarking.launch import run
from benchmarking.options import BenchmarkArguments
from transformers import HfArgumentParser

from hf_ouroboros.memory_use import peak_memory
from hf_ouroboros.planning.hardware import PRESETS
from hf_ouroboros.planning.memory_model import MemoryOptions
from hf_ouroboros.planning.planner import SplitPlan, plan_split
from hf_ouroboros.planning.planner import estimated as estimate
from hf_ouroboros.planning.unit_facts import model_facts

# glibc: tensors from 64 KiB on have memory of their own, which the system gets back with them.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A run.

    Args:
        model: its type.
        sizes: layers, width, rows of a micro-batch, tokens per row.
        devices: processes; a tied model has one stage more.
        micro_batches: M.
        precision: of weights, "float32" or "bfloat16"; or "autocast", float32 computed in bfloat16.
        lora_rank: of adapters, which alone are trained; None to train the model.
    """

    model: str
    sizes: tuple[int, int, int, int]
    devices: int
    micro_batches: int
    precision: str = "float32"
    lora_rank: int | None = None

    def __str__(self) -> str:
        adapters = "" if self.lora_rank is None else f", LoRA of rank {self.lora_rank}"
        return f"{self.model} {', '.join(map(str, self.sizes))}; {self.precision}{adapters}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads MODEL:LAYERS,WIDTH,ROWS,TOKENS:PROCESSES:M[:PRECISION[:LORA_RANK]].

        Raises:
            SystemExit: it is not that.
        """
        try:
            model, sizes, devices, micro_batches, *rest = text.split(":")
            layers, width, rows, time = map(int, sizes.split(","))
            precision, *rank = rest or ["float32"]
            if precision not in PRECISIONS or len(rank) > 1:
                raise ValueError
            adapters = int(rank[0]) if rank else None
            return cls(model, (layers, width, rows, time), int(devices), int(micro_batches), precision, adapters)
        except ValueError:
            raise SystemExit(
                f"--cases {text!r} is not MODEL:LAYERS,WIDTH,ROWS,TOKENS:PROCESSES:M[:PRECISION[:LORA_RANK]] with a precision of "
                f"{', '.join(PRECISIONS)}"
            ) from None


PRECISIONS = ("float32", "autocast", "bfloat16")
SHAPES = ["gpt2:8,256,4,256:2:4", "gpt2:12,128,8,128:2:1", "gpt2:6,384,2,256:2:2"]
STAGES = [f"llama:8,384,2,128:4:{rest}" for rest in ("4", "1", "4:float32:8")]
# CPUs take long for products in bfloat16.
HALVES = [f"llama:8,256,1,256:4:4:{precision}" for precision in ("autocast", "bfloat16")]
# Hardly any activations, for the bytes per parameter.
PARAMETERS = [f"llama:16,512,1,8:4:4:{precision}" for precision in PRECISIONS]


@dataclass
class MemoryBenchmarkArguments:
    """What to measure."""

    cases: list[str] = field(
        default_factory=lambda: [*SHAPES, *STAGES, *HALVES, *PARAMETERS],
        metadata={
            "help": "MODEL:LAYERS,WIDTH,ROWS,TOKENS:PROCESSES:M[:PRECISION[:LORA_RANK]], the precision being float32, autocast "
            "(float32 computed in bfloat16) or bfloat16. Default: GPT-2s of benchmark_plan.py, a Llama of four stages in all "
            "precisions and with adapters, and one with hardly any activations."
        },
    )
    updates: int = field(default=6, metadata={"help": "Optimizer steps per run."})
    output_dir: str = field(default="runs/benchmark_memory", metadata={"help": "Where results go."})


def options_of(case: Case, folder: Path, updates: int) -> BenchmarkArguments:
    """As the benchmark knows it."""
    layers, width, rows, time = case.sizes
    return BenchmarkArguments(
        devices=[f"cpu:{i}" for i in range(case.devices)],
        device_map=str(folder / "plan.json"),
        model_type=case.model,
        n_layer=layers,
        n_embd=width,
        batch_size=rows,
        block_size=time,
        untied=case.model != "gpt2",
        micro_batches=case.micro_batches,
        updates=updates,
        lora_rank=case.lora_rank,
    )


def planned(case: Case, options: BenchmarkArguments) -> SplitPlan:
    """What `hf-ouroboros plan` plans for as many devices of one kind."""
    dtype = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
    facts = model_facts(
        options.config(),
        options.batch_size,
        options.block_size,
        dtype,
        case.lora_rank,
        autocast=case.precision == "autocast",
    )
    devices = [estimate(facts, PRESETS["rtx3090"])] * case.devices
    return plan_split(facts, devices, MemoryOptions(micro_batches=case.micro_batches))


def measure(case: Case, folder: Path, updates: int) -> dict[str, Any]:
    """Bytes of every process, planned and found."""
    options = options_of(case, folder, updates)
    plan = planned(case, options)
    Path(options.device_map).write_text(json.dumps(plan.device_map()), encoding="utf-8")
    setting = ":bf16=True" if case.precision == "autocast" else ""
    contender = parse_contender(
        f"pipelined{setting}@processes", case.micro_batches, options.global_batch, len(options.devices)
    )
    job = Job(options, contender, 0, folder / "none", folder, updates)
    dtype = "bfloat16" if case.precision == "bfloat16" else "float32"
    found = run(job, partial(memory.run, dtype=dtype))
    return {
        "case": str(case),
        "K": len(plan.stages),
        "M": case.micro_batches,
        "planned": [plan.bytes_on(device) for device in range(case.devices)],
        "parts": [[vars(s.memory) for s in plan.stages if s.device == d] for d in range(case.devices)],
        **{name: found[name] for name in ("training", "with the end", "parameters")},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: MiB of every process."""
    lines = [
        "| model: layers, width, rows, tokens; precision | K | M | predicted MiB per process | measured | predicted / measured |",
        "|---|---|---|---|---|---|",
    ]
    for found in results:
        ratios = ", ".join(f"{p / m:.2f}" for p, m in zip(found["planned"], found["training"], strict=True))
        planned_, measured = (", ".join(f"{x / MIB:.0f}" for x in found[k]) for k in ("planned", "training"))
        lines.append(f"| {found['case']} | {found['K']} | {found['M']} | {planned_} | {measured} | {ratios} |")
    return "\n".join(lines)


def table_of_parameters(results: list[dict[str, Any]]) -> str:
    """Markdown: bytes per parameter of the first process."""
    lines = [
        "| model: layers, width, rows, tokens; precision | K | M | held, predicted | activations, messages, working memory "
        "| measured, all | measured, held |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results:
        count, parts = found["parameters"][0], found["parts"][0]
        other = sum(part[k] for part in parts for k in ("activations", "working", "messages")) / count
        everything = found["training"][0] / count
        columns = (found["planned"][0] / count - other, other, everything, everything - other)
        lines.append(
            f"| {found['case']} | {found['K']} | {found['M']} | " + " | ".join(f"{x:.1f}" for x in columns) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Plans and runs, case by case."""
    if not MALLOC.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)  # read once, when a process starts
    (arguments,) = HfArgumentParser(MemoryBenchmarkArguments, description=__doc__).parse_args_into_dataclasses()
    if peak_memory().resident is None:
        raise SystemExit("the resident size of a process is known on Linux only; run this there")
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for case in [Case.parse(text) for text in arguments.cases]:
        with tempfile.TemporaryDirectory() as scratch:
            results.append(measure(case, Path(scratch), arguments.updates))
        print(table(results[-1:]).splitlines()[-1], flush=True)
    machine = f"{os.cpu_count()} x {platform.processor() or platform.machine()}, torch {torch.__version__}"
    parameters = f"Bytes per parameter of the first process:\n\n{table_of_parameters(results)}"
    text = "\n\n".join([table(results), parameters, f"Machine: {machine}. Settings: {vars(arguments)}.\n"])
    (output / "results.md").write_text(text, encoding="utf-8")
    (output / "results.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
