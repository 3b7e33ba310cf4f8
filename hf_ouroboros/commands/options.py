"""Options that `plan` and `simulate` share, and what they mean: a configuration, links."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputFileError, UnsupportedModelError, UnsupportedOptionError
from ..options import Number, Whole, shown
from ..simulate.sharded import FSDP
from ..simulate.simulator import simulated
from ..user_files import read_text
from .overrides import check_sizes, read_overrides

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from ..simulate.links import Links

MOST_BYTES = 2**26  # of a configuration's file
MOST_SPLITTING, MOST_SIMULATED = 5e8, 2_100_000  # steps of the search for a split; instructions of all simulated runs


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and the shape of its micro-batches."""
    parser.add_argument(
        "model",
        help="folder of a model, config.json, Hub name whose configuration is in the cache, or a model type such as "
        "gpt2 or llama with that type's default configuration; weights are not needed",
    )
    parser.add_argument(
        "--config_overrides", default="", help="changes of the configuration, as num_hidden_layers=48,hidden_size=1600"
    )
    parser.add_argument("--batch", type=Whole(1, 2**20), default=1, help="rows of a micro-batch (default 1)")
    parser.add_argument("--seq", type=Whole(1, 2**24), default=1024, help="tokens per row (default 1024)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default=None, help="default: the configuration's"
    )
    parser.add_argument("--recompute", action="store_true", help="keep only stage inputs, replay forwards")
    parser.add_argument(
        "--weights",
        choices=["then", "now"],
        default="then",
        help="of late backwards: then, older versions being kept (default), or now, with a replay and no older version",
    )


GIGABYTES, MICROSECONDS = Number(1e-6, 1e6), Number(0, 1e9)


def add_link_options(parser: argparse.ArgumentParser) -> None:
    """Connections between devices but their bandwidth."""
    parser.add_argument("--latency", type=MICROSECONDS, default=10.0, help="microseconds between devices (default 10)")
    parser.add_argument("--devices_per_host", type=Whole(1, 2**20), default=None, help="default: all on one host")
    parser.add_argument("--host_link", type=GIGABYTES, default=None, help="GB/s between hosts (default: as within one)")
    parser.add_argument("--host_latency", type=MICROSECONDS, default=None, help="microseconds between hosts")


def links(arguments: argparse.Namespace, gigabytes: float) -> Links:
    """The connections that the options describe."""
    from ..simulate.links import Links

    return Links(
        gigabytes * 1e9,
        arguments.latency * 1e-6,
        arguments.devices_per_host,
        None if arguments.host_link is None else arguments.host_link * 1e9,
        None if arguments.host_latency is None else arguments.host_latency * 1e-6,
    )


def schedules() -> list[str]:
    """All that can be predicted: our schedules, and what other software does."""
    return [*simulated(), FSDP]


def load_config(arguments: argparse.Namespace) -> PretrainedConfig:
    """The model's configuration, with its changes; nothing is downloaded, no code that comes with it is run.

    Raises:
        UnsupportedModelError: there is none by this name, or it is none of a model that can be planned.
        InputFileError: its file can't be read.
        UnsupportedOptionError: a change of something that the configuration does not have.
    """
    from transformers import AutoConfig

    name = arguments.model
    by_type = name in _model_types() and not Path(name).exists()
    try:
        if by_type:
            config = AutoConfig.for_model(name)
        else:
            file = Path(name, "config.json") if Path(name).is_dir() else Path(name)
            if file.exists():
                read_text(file, MOST_BYTES)
            config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except InputFileError:
        raise
    except Exception as error:  # each configuration has its own way to say that it can't be one
        raise UnsupportedModelError(
            f"no configuration for {shown(name)} ({_first_line(error)}). Give a folder, a config.json, a Hub name whose "
            "configuration is in the cache (`hf download NAME config.json`), or a model type such as gpt2 or llama"
        ) from error
    changes = read_overrides(arguments.config_overrides, config)
    try:
        if by_type and changes:  # made anew, as one option may follow from another
            config = AutoConfig.for_model(name, **changes)
        else:
            for option, value in changes.items():
                setattr(config, option, value)
    except Exception as error:
        raise UnsupportedOptionError(
            f"--config_overrides: {shown(arguments.config_overrides)} is refused by {type(config).__name__} "
            f"({_first_line(error)})"
        ) from error
    check_sizes(config)
    return config


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _model_types() -> set[str]:
    from transformers import CONFIG_MAPPING

    import hf_ouroboros.models.transfo_xl  # noqa: F401  registers its configuration

    return set(CONFIG_MAPPING.keys())


def data_type(arguments: argparse.Namespace, config: PretrainedConfig) -> torch.dtype:
    """The dtype asked for, else the configuration's, else float32.

    Raises:
        UnsupportedModelError: the configuration's is no floating-point type.
    """
    import torch

    chosen = arguments.dtype or getattr(config, "dtype", None) or "float32"
    found = chosen if isinstance(chosen, torch.dtype) else getattr(torch, str(chosen), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UnsupportedModelError(
            f"the configuration's dtype={shown(chosen)} is no floating-point type; give --dtype bfloat16, say"
        )
    return found


def check_work(layers: int, runs: Iterable[tuple[int, int]]) -> None:
    """Refuses to plan and simulate what would take minutes.

    Args:
        layers: of the model.
        runs: number of devices and M of everything that is to be simulated.

    Raises:
        UnsupportedOptionError: too many layers, devices or micro-batches together.
    """
    total = 0
    for devices, micro_batches in runs:
        stages = min(devices, layers) + 1
        if stages * (layers + 1) ** 3 > MOST_SPLITTING:
            raise UnsupportedOptionError(
                f"{layers} layers on {devices} devices have too many splits to try them all; plan fewer devices, or a "
                "model of fewer layers of the same size"
            )
        total += (devices + 1) * (4 * devices + 3 * micro_batches + 50)
    if total > MOST_SIMULATED:
        raise UnsupportedOptionError(
            "so many devices and micro-batches per update take too long to simulate; give fewer (micro_batches of twice "
            "the devices show what more of them would)"
        )
