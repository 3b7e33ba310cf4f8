"""`hf-ouroboros plan`: which split, how much memory, how fast, before anything is rented or loaded."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DeviceMapError, UnsupportedOptionError
from ..options import Place, Whole
from ..schedules import DEFAULT, SCHEDULES
from ..simulate.simulator import ours
from ..user_files import check_writable, written_together
from .options import (
    GIGABYTES,
    add_link_options,
    add_model_options,
    check_work,
    data_type,
    links,
    load_config,
    schedules,
)
from .plan_report import delay, device_table, headline, schedule_table, stage_table, weighed

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from ..planning.hardware import DeviceKind
    from ..planning.planner import PlannedDevice, SplitPlan
    from ..planning.unit_facts import ModelFacts
    from ..simulate.simulator import Simulation


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to those of `hf-ouroboros`."""
    parser = commands.add_parser(
        "plan",
        help="best split of a model over devices, with memory and speed; weights are not needed",
        description="Prints stages, memory and predicted speed; writes OUTPUT.json for --device_map and OUTPUT.png.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--devices",
        nargs="+",
        required=True,
        metavar="DEVICE",
        help="in worker order: [COUNTx]KIND by data sheet (8xrtx3090), [COUNTx]35tflops/24gb (sustained), or devices of "
        "this machine (cuda:0 cuda:1, cpu:0 cpu:1), which are measured",
    )
    parser.add_argument(
        "--micro_batches", type=Whole(1, 2**16), default=8, help="M, micro-batches per update (default 8)"
    )
    parser.add_argument(
        "--bf16", action="store_true", help="as in TrainingArguments: float32 weights, products in bfloat16 (autocast)"
    )
    parser.add_argument("--schedule", choices=ours(), default=DEFAULT)
    parser.add_argument("--num_stages", type=Whole(1, 2**12), default=None, help="K (default: as OuroborosTrainer)")
    parser.add_argument(
        "--device_map",
        choices=["auto", "mixed"],
        default="auto",
        help="auto: a run of layers per device; mixed: also several per device, where the simulated speed is worth the stages",
    )
    parser.add_argument("--optimizer", choices=["adamw", "momentum", "sgd"], default="adamw", help="for its memory")
    parser.add_argument(
        "--lora_rank",
        type=Whole(1, 2**16),
        default=None,
        help="train LoRA adapters of this rank only, on all linear modules",
    )
    parser.add_argument(
        "--quantization",
        choices=["nf4", "int8"],
        default=None,
        help="pack the matrices below the adapters: nf4 with double quantization (bitsandbytes), or int8 (also torchao, quanto)",
    )
    parser.add_argument(
        "--data_parallel_replicas", type=Whole(1, 2**20), default=1, help="R, each on devices of its own"
    )
    parser.add_argument("--link", type=GIGABYTES, default=25.0, help="GB/s between two devices (default 25)")
    add_link_options(parser)
    parser.add_argument(
        "--output", type=Place(), default="plan", help="path of the files to write, without suffix (default plan)"
    )
    parser.add_argument("--measure_again", action="store_true", help="don't use what was measured before")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plans; returns the exit status."""
    output = Path(arguments.output)
    files = [output.with_name(f"{output.name}{suffix}") for suffix in (".json", ".png")]
    check_writable("--output", *files)
    if arguments.weights == "now" and SCHEDULES[arguments.schedule].is_synchronous:
        raise UnsupportedOptionError(
            f"--weights now: with --schedule {arguments.schedule} no backward is late, and no older weights are kept; leave it out"
        )
    with _no_garbage_collection():
        from ..planning.memory_model import MemoryOptions
        from ..planning.mixed_plan import FURTHER, mixed_plans
        from ..planning.planner import plan_split
        from ..planning.unit_facts import model_facts
        from .prediction import fewest_stages, ideal, predict

        kinds = _kinds(arguments)
        config = load_config(arguments)
        if arguments.lora_rank is not None and any(isinstance(kind, str) for kind in kinds):
            raise UnsupportedOptionError(
                f"--lora_rank {arguments.lora_rank}: devices of this machine are measured training whole layers; plan for kinds "
                "by data sheet"
            )
        if arguments.quantization is not None and arguments.lora_rank is None:
            raise UnsupportedOptionError(
                f"--quantization {arguments.quantization}: packed matrices can't be trained, only adapters on top of them; add "
                "--lora_rank 16"
            )
        dtype = data_type(arguments, config)
        _check_autocast(arguments, dtype, kinds)
        adapters = arguments.lora_rank, arguments.quantization
        facts = model_facts(config, arguments.batch, arguments.seq, dtype, *adapters, arguments.bf16)
    tried = FURTHER + 1 if arguments.device_map == "mixed" else 0
    check_work(facts.layers, [(len(kinds), arguments.micro_batches)] * (len(schedules()) + tried))
    options = MemoryOptions(
        arguments.schedule, arguments.micro_batches, arguments.recompute, arguments.optimizer, arguments.weights
    )
    devices, connections = _devices(arguments, kinds, config, facts), links(arguments, arguments.link)
    if arguments.device_map == "mixed":
        plans = mixed_plans(facts, devices, options, arguments.num_stages)
        plan, speeds = fewest_stages(plans, arguments.schedule, connections, arguments.data_parallel_replicas)
    else:
        plan, speeds = plan_split(facts, devices, options, arguments.num_stages), {}
    runs, left_out = {}, {}
    for schedule in schedules():
        try:
            runs[schedule] = predict(plan, schedule, connections, arguments.data_parallel_replicas)
        except ValueError as error:  # a peer that can't do these numbers of stages or micro-batches
            left_out[schedule] = str(error)
    if arguments.schedule not in runs:
        raise UnsupportedOptionError(f"--schedule {arguments.schedule}: {left_out[arguments.schedule]}")
    chosen = runs[arguments.schedule]
    print(headline(plan))
    print(delay(plan))
    if speeds:
        print(weighed(plan, speeds))
    print("\n" + stage_table(plan))
    print("\n" + device_table(plan, chosen))
    print("\n" + schedule_table(plan, runs, ideal(plan), arguments.data_parallel_replicas))
    for schedule, reason in left_out.items():
        print(f"{schedule}: not simulated, {reason}")
    with written_together(*files) as (new_map, new_picture):
        new_map.write_text(json.dumps(plan.device_map(), indent=1) + "\n", encoding="utf-8")
        _picture(plan, chosen, new_picture)
    print(f"\ndevice map: {files[0]}" + ("" if facts.untrainable else f" (for --device_map {files[0]})"))
    print(f"timeline:   {files[1]}")
    return 0


def _check_autocast(arguments: argparse.Namespace, dtype: torch.dtype, kinds: Sequence[DeviceKind | str]) -> None:
    """Refuses autocast where it would do nothing, or is not measured."""
    if not arguments.bf16:
        return
    if dtype.itemsize < 4:
        raise UnsupportedOptionError(
            f"--bf16 with weights in {str(dtype).removeprefix('torch.')}: autocast computes products of float32 weights in "
            "bfloat16; give --dtype float32, or leave --bf16 out"
        )
    if any(isinstance(kind, str) for kind in kinds):
        raise UnsupportedOptionError(
            "--bf16: devices of this machine are measured without autocast; plan for kinds by data sheet"
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Importing torch and transformers makes a million objects that stay: looking through them takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def _kinds(arguments: argparse.Namespace) -> list[DeviceKind | str]:
    """The devices that the options name: kinds by data sheet, or names of devices that are here."""
    from ..planning.hardware import is_here, parse_devices

    try:
        kinds = parse_devices(arguments.devices)
    except DeviceMapError as error:
        raise UnsupportedOptionError(str(error)) from error
    here = [kind for kind in kinds if isinstance(kind, str)]
    if here and len(here) < len(kinds):
        raise UnsupportedOptionError(
            f"--devices mixes devices of this machine ({here[0]}) with kinds by data sheet; use the one or the other"
        )
    if len(set(here)) < len(here):
        raise UnsupportedOptionError(f"--devices {' '.join(here)} must be different devices, e.g. cpu:0 cpu:1")
    if missing := [name for name in here if not is_here(name)]:
        raise UnsupportedOptionError(
            f"--devices names {missing[0]!r}, which this machine doesn't have; plan for kinds by data sheet instead"
        )
    return kinds


def _devices(
    arguments: argparse.Namespace, kinds: list[DeviceKind | str], config: PretrainedConfig, facts: ModelFacts
) -> list[PlannedDevice]:
    from ..planning.measure import CACHE, measured
    from ..planning.planner import estimated

    here = [kind for kind in kinds if isinstance(kind, str)]
    if not here:
        return [estimated(facts, kind) for kind in kinds if not isinstance(kind, str)]
    return measured(config, facts, here, CACHE, again=arguments.measure_again)


def _picture(plan: SplitPlan, chosen: Simulation, path: Path) -> None:
    from ..simulate.picture import draw

    title = f"{plan.facts.name}, {chosen.schedule}, predicted: {len(chosen.busy_shares)} devices"
    draw(chosen.timeline, path, title=title)
