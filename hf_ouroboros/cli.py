"""The console script `hf-ouroboros`: small tools around training runs."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from .commands import plan, simulate, trace
from .errors import OuroborosError, UnsupportedOptionError
from .models.command import add_parser as add_convert_transfo_xl


def environment() -> str:
    """Versions and devices, for bug reports."""
    import torch

    lines = [f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in ("hf_ouroboros", "torch", "transformers", "accelerate", "datasets", "evaluate"):
        try:
            lines.append(f"{name:<13} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name:<13} not installed")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    lines.append(f"accelerators  {f'{count} x {accelerator.type}' if accelerator else 'none'}")
    lines.append(f"cpu threads   {torch.get_num_threads()}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for what failed, 2 for what can't be meant, 130 after Ctrl-C.

    A mistake is told in one line. A traceback means that this software is wrong.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    parsed = _parser().parse_args(arguments)
    try:
        status = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except UnsupportedOptionError as error:
        return _failed(error, 2)
    except OuroborosError as error:
        return _failed(error, 1)
    except BrokenPipeError:  # as in `hf-ouroboros plan ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that vanished
        return _failed(error, 1)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-ouroboros", description="Tools around OuroborosTrainer.")
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser("env", help="print versions and devices, for bug reports")
    env.set_defaults(run=_print_environment)
    for command in (plan, simulate, trace):
        command.add_parser(commands)
    add_convert_transfo_xl(commands)
    return parser


def _failed(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


def _print_environment(arguments: argparse.Namespace) -> int:
    print(environment())
    return 0


if __name__ == "__main__":
    sys.exit(main())
