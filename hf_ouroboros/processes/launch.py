"""How the processes of a run were started, and whether they know each other: early errors with the right command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

from ..errors import ProcessLaunchError

COMMANDS = (
    "torchrun --nproc_per_node N script.py, or accelerate launch --multi_gpu --num_processes N script.py "
    "(the same on CPUs, with --use_cpu True behind the script's name)"
)


def launched_processes() -> int:
    """How many processes the launcher says there are."""
    return max(1, int(os.environ.get("WORLD_SIZE", 1)))


def check_launch() -> None:
    """Refuses a launch whose processes were silently reduced to one.

    `accelerate launch --cpu --num_processes 2` and configurations with `distributed_type: MULTI_CPU` start a single
    process, without a word, where no MPI is used.

    Raises:
        ProcessLaunchError: with the command that does it.
    """
    if launched_processes() > 1 and (missing := {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()):
        raise ProcessLaunchError(
            f"WORLD_SIZE={launched_processes()}, but {', '.join(sorted(missing))} not set: the processes could not find "
            f"each other; use {COMMANDS}, or unset WORLD_SIZE for one process"
        )
    wanted = _asked_of_accelerate()
    if launched_processes() == 1 and wanted > 1:
        raise ProcessLaunchError(
            f"accelerate launch was asked for {wanted} processes but started one (it does so for --cpu and for "
            f"distributed_type MULTI_CPU); use {COMMANDS}"
        )


def check_started(world_size: int) -> None:
    """Refuses processes that each believe to be alone.

    Args:
        world_size: how many processes found each other.

    Raises:
        ProcessLaunchError: with the command that does it.
    """
    if launched_processes() != world_size:
        raise ProcessLaunchError(
            f"WORLD_SIZE={launched_processes()}, but the processes don't know each other (torch.distributed has "
            f"{world_size}): every one of them would train alone and overwrite the others' files; use {COMMANDS}"
        )


def _asked_of_accelerate() -> int:
    """The number of processes on the command line, or in its configuration file, of an `accelerate launch` above us."""
    if not any(name.startswith("ACCELERATE_") for name in os.environ):
        return 1
    import psutil  # comes with accelerate

    try:
        command = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return 1
    if "launch" not in command and not any(part.endswith("accelerate-launch") for part in command):
        return 1
    script = next((i for i, part in enumerate(command) if part == sys.argv[0]), len(command))
    options = _options(command[:script])
    try:
        if "num_processes" in options:
            return int(options["num_processes"])
        if "config_file" in options:
            return int(yaml.safe_load(Path(options["config_file"]).read_text(encoding="utf-8")).get("num_processes", 1))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        pass
    return 1


def _options(command: list[str]) -> dict[str, str]:
    """`--name value` and `--name=value` of a command line, with underscores."""
    options = {}
    for part, following in zip(command, [*command[1:], ""], strict=True):
        if part.startswith("--"):
            name, _, value = part[2:].partition("=")
            options[name.replace("-", "_")] = value or following
    return options
