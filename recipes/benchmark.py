"""Throughput, or time to a loss, of ours and of what one would use instead: one command, one run, one table, one plot.

    python recipes/benchmark.py                          # two CPU devices, one core each
    python recipes/benchmark.py --devices cuda:0 cuda:1 --n_embd 1024 --n_layer 24 --vocab_size 50304
    python recipes/benchmark.py --until_loss naive --updates 400 --contenders naive 1f1b@processes pipelined:M=8@processes

All contenders (see `benchmarking/contenders.py`) train the same model on the same global batches with the same optimizer,
one after the other, in processes of their own; a contender that fails or hangs is reported and the others go on. Ratios are
taken within a repetition. On CPU, "naive" computes with one core, which is what devices that take turns amount to; on
accelerators it is the model dispatched over the devices.

Throughput is the steady state: whole updates after the first ten micro-batches. Those that apply gradients at once (naive,
ddp, fsdp, torch-*, 1f1b, zero_bubble) must all have the losses of the naive run, or the table says that they have not. Of the
contenders that run by default, those that can't (a schedule that this torch lacks, an M that it does not take) are left
out, with the reason below the table; named in --contenders, they are refused.

With --until_loss, runs end at the first evaluation with the target loss. The clock stands still during evaluations; that
the pipelines have to empty before and to fill after them is counted.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarking import plots, report
from benchmarking.contenders import Contender, ContenderError
from benchmarking.job import Job
from benchmarking.launch import RunFailed, run
from benchmarking.options import BenchmarkArguments
from benchmarking.text import write_blocks
from transformers import HfArgumentParser

# glibc gives freed memory back to the system and has it zeroed again when it is needed next: for all contenders alike, off.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


def run_all(
    options: BenchmarkArguments, contenders: list[Contender], data: Path, output: Path
) -> list[list[report.Run]]:
    """All contenders, as often as asked; who has failed does not run again."""
    results: list[list[report.Run]] = []
    failed: dict[str, str] = {}
    for repetition in range(options.repetitions):
        results.append([])
        target = None if options.until_loss in (None, "naive") else float(options.until_loss)
        for contender in contenders:
            folder = output / "runs" / re.sub(r"[^\w.=-]+", "_", contender.label)
            sets_target = options.sets_target(contender)
            job = Job(options, contender, options.seed + repetition, data, folder, options.planned_updates(contender))
            if options.until_loss is not None:
                job = replace(job, evaluate=True, target=target)
            if options.until_loss == "naive" and target is None and not sets_target:
                failed.setdefault(contender.label, "has no target, because the naive run failed")
            try:
                if contender.label in failed:
                    raise RunFailed(failed[contender.label])
                result = run(job)
                if sets_target:
                    target = result["evaluations"][-1][2] * (1 + options.slack)
                if options.until_loss is not None:
                    result |= {"target": target, "tokens_per_update": options.tokens_per_update}
            except RunFailed as error:
                failed[contender.label] = str(error)
                result = {"contender": contender.label, "failed": str(error)}
            results[-1].append(result)
            print(f"repetition {repetition + 1}: {contender.label:<28} {in_short(result)}", flush=True)
    return results


def in_short(result: report.Run) -> str:
    """One run on one line."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    speed = f"{result['tokens_per_second']:10,.0f} tokens/s"
    if "target" not in result:
        return speed
    reached = report.seconds_to_target(result)
    return f"{speed}, target {result['target']:.4f} " + (f"after {reached:,.1f} s" if reached else "not reached")


def write_report(options: BenchmarkArguments, contenders: list[Contender], results: list[Any], output: Path) -> str:
    """Writes results.json, results.md and results.png; returns the text."""
    if options.until_loss is None:
        table = report.throughput_table(contenders, results, len(options.devices))
        plots.draw_speedups(contenders, results, len(options.devices), output / "results.png")
    else:
        table = report.time_to_loss_table(contenders, results)
        plots.draw_losses(contenders, results, output / "results.png")
    machine = f"{os.cpu_count()} x {platform.processor() or platform.machine()}, torch {torch.__version__}"
    if not options.on_cpu:
        machine += f", {len(options.devices)} x {torch.cuda.get_device_name(0)}"
    settings = ", ".join(f"{k}={v}" for k, v in vars(options).items() if k not in ("contenders", "output_dir"))
    head = (
        "untied" if options.untied else "tied; torch-* keep a copy of the matrix on either side and sum their gradients"
    )
    left_out = options.left_out()
    missing = "".join(f"- left out: {reason}\n" for reason in left_out.values()) + ("\n" if left_out else "")
    text = f"{table}\n\n{missing}Machine: {machine}. Embedding and head: {head}. Settings: {settings}.\n"
    (output / "results.md").write_text(text, encoding="utf-8")
    found = {"machine": machine, "options": vars(options), "results": results, "left_out": left_out}
    if options.until_loss is None:
        found["loss_differences"] = {
            c.label: report.loss_difference(c, results) for c in contenders if c.is_synchronous
        }
    (output / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return text


def main() -> None:
    """Runs everything and writes the report."""
    if not MALLOC.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)  # read once, when a process starts
    (options,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no process is left behind
    output = Path(options.output_dir).absolute()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            options.take_sizes()
            options.check()
            write_blocks(options, Path(scratch) / "blocks.pt")
        except ContenderError as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
        contenders = options.parsed_contenders()
        for reason in options.left_out().values():
            print(f"left out: {reason}", flush=True)
        results = run_all(options, contenders, Path(scratch) / "blocks.pt", output)
    plan = next((r["stage_plan"] for repetition in results for r in repetition if "stage_plan" in r), None)
    if plan is not None:
        print(f"\n{plan}\n")
    print(write_report(options, contenders, results, output))


if __name__ == "__main__":
    main()
