"""Options that `plan` and `simulate` share, and what they mean: a configuration, links."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError, UnsupportedOptionError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from ..simulate.links import Links


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
    parser.add_argument("--batch", type=positive, default=1, help="rows of a micro-batch (default 1)")
    parser.add_argument("--seq", type=positive, default=1024, help="tokens per row (default 1024)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default=None, help="default: the configuration's"
    )
    parser.add_argument("--recompute", action="store_true", help="keep only stage inputs, replay forwards")


def add_link_options(parser: argparse.ArgumentParser) -> None:
    """Connections between devices but their bandwidth."""
    parser.add_argument("--latency", type=float, default=10.0, help="microseconds between devices (default 10)")
    parser.add_argument("--devices_per_host", type=positive, default=None, help="default: all on one host")
    parser.add_argument("--host_link", type=float, default=None, help="GB/s between hosts (default: as within one)")
    parser.add_argument("--host_latency", type=float, default=None, help="microseconds between hosts")


def links(arguments: argparse.Namespace, gigabytes: float) -> Links:
    """The connections that the options describe."""
    from ..simulate.links import Links

    try:
        return Links(
            gigabytes * 1e9,
            arguments.latency * 1e-6,
            arguments.devices_per_host,
            None if arguments.host_link is None else arguments.host_link * 1e9,
            None if arguments.host_latency is None else arguments.host_latency * 1e-6,
        )
    except ValueError as error:
        raise UnsupportedOptionError(str(error)) from error


def load_config(arguments: argparse.Namespace) -> PretrainedConfig:
    """The model's configuration, with its changes; nothing is downloaded.

    Raises:
        UnsupportedModelError: there is none by this name.
        UnsupportedOptionError: a change of something that the configuration does not have.
    """
    import yaml
    from transformers import AutoConfig

    name = arguments.model
    by_type = name in _model_types() and not Path(name).exists()
    try:
        if by_type:
            config = AutoConfig.for_model(name)
        else:
            config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"no configuration for {name!r} ({str(error).splitlines()[0]}). Give a folder, a config.json, a Hub name whose "
            "configuration is in the cache (`hf download NAME config.json`), or a model type such as gpt2 or llama"
        ) from error
    changes = {}
    for item in filter(None, re.split(r",(?![^\[{]*[\]}])", arguments.config_overrides)):  # not inside of a list
        option, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not hasattr(config, option):
            raise UnsupportedOptionError(
                f"--config_overrides {item!r}: write name=value with a name that a {config.model_type} configuration has"
            )
        changes[option] = yaml.safe_load(value)
    if by_type and changes:  # made anew, as one option may follow from another
        return AutoConfig.for_model(name, **changes)
    for option, value in changes.items():
        setattr(config, option, value)
    return config


def _model_types() -> set[str]:
    from transformers import CONFIG_MAPPING

    import hf_ouroboros.models.transfo_xl  # noqa: F401  registers its configuration

    return set(CONFIG_MAPPING.keys())


def data_type(arguments: argparse.Namespace, config: PretrainedConfig) -> torch.dtype:
    """The dtype asked for, else the configuration's, else float32."""
    import torch

    chosen = arguments.dtype or getattr(config, "dtype", None) or "float32"
    return chosen if isinstance(chosen, torch.dtype) else getattr(torch, str(chosen))


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value
