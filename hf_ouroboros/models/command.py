"""The command `hf-ouroboros convert-transfo-xl`; imports torch only when it runs."""

from __future__ import annotations

import argparse

from ..options import Place, from_json, shown


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the command to those of `hf-ouroboros`; `arguments.run(arguments)` runs it and gives the exit status."""
    parser = commands.add_parser(
        "convert-transfo-xl",
        help="convert an old Transformer-XL checkpoint and vocabulary, safely, to what transformers 5 loads",
        description="Writes config.json, model.safetensors and tokenizer.json. Nothing in the old files is executed.",
    )
    parser.add_argument(
        "source", type=Place(folder=True), help="folder with the old checkpoint (and config.json), vocabulary, or both"
    )
    parser.add_argument("target", type=Place(folder=True), help="folder for the result")
    parser.add_argument(
        "--config", type=_json_object, default={}, help='values that win over config.json, as {"mem_len": 640}'
    )
    parser.add_argument(
        "--allow_stubs",
        action="store_true",
        help="read pickles that hold more than plain data; unknown objects become inert (original repository's files)",
    )
    parser.add_argument("--no_eos", action="store_true", help="a tokenizer that doesn't append <eos>")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Converts; returns the exit status."""
    from .transfo_xl.conversion import convert

    model, tokenizer = convert(
        arguments.source,
        arguments.target,
        arguments.config,
        arguments.allow_stubs,
        add_eos=False if arguments.no_eos else None,
    )
    if model is not None:
        print(f"model:     {model.num_parameters():,} parameters in {arguments.target}")
    if tokenizer is not None:
        print(f"tokenizer: {len(tokenizer):,} words in {arguments.target}")
    return 0


def _json_object(text: str) -> dict:
    try:
        value = from_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{shown(text)} is no JSON object, as {{"mem_len": 640}}')
    return value
