"""How fast is our Transformer-XL? One attention block, forward and backward, and generation with a full memory.

    python recipes/benchmark_transfo_xl.py
    python recipes/benchmark_transfo_xl.py --reference_python venv457/bin/python   # also 4.57.6, and the ratios

The reference is the last Transformer-XL that transformers had, in an interpreter with transformers 4.57.6 and the same
torch. Every repetition measures both, one after the other, in fresh processes; ratios are taken within a repetition,
and medians are printed. One thread, CPU, float32. The block is the attention of an enwik8 layer; generation uses two
layers of the large WikiText-103 model and is given per layer and token, a softmax over 1000 words included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

BATCH, SEGMENT, MEMORY = 4, 512, 512
BLOCK = {"d_model": 512, "n_head": 8, "d_head": 64}
GENERATION = {"d_model": 1024, "d_embed": 1024, "n_head": 16, "d_head": 64, "d_inner": 4096, "n_layer": 2}
GENERATION |= {"vocab_size": 1000, "cutoffs": [], "div_val": 1, "mem_len": 1600, "clamp_len": 1000}
BLOCK_RUNS, TOKENS = 3, 12


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference_python", help="path of an interpreter that has transformers 4.57.6")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--worker", choices=("ours", "reference"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        torch.set_num_threads(1)
        print(json.dumps(_measure(_ours() if arguments.worker == "ours" else _reference())))
        return
    ours, reference = [], []
    for _ in range(arguments.repetitions):
        ours.append(_run(sys.executable, "ours"))
        if arguments.reference_python:
            reference.append(_run(arguments.reference_python, "reference"))
    print("| | ours, ms (min - max) | transformers 4.57.6, ms (min - max) | speed-up (min - max) |\n|---|---|---|---|")
    for name in ours[0]:
        mine, theirs = [run[name] for run in ours], [run[name] for run in reference]
        ratios = [b / a for a, b in zip(mine, theirs, strict=False)]
        print(f"| {name} | {_spread(mine)} | {_spread(theirs)} | {_spread(ratios)} |")


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):,.4g} ({min(values):,.4g} - {max(values):,.4g})"


def _run(python: str, worker: str) -> dict[str, float]:
    command = [python, str(Path(__file__).resolve()), "--worker", worker]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def _measure(workload: tuple[Callable[[], None], Callable[[], None], int]) -> dict[str, float]:
    """Milliseconds: of the block, the median of some runs; of generation, per layer and token."""
    block, token, num_layers = workload
    block()
    times = []
    for _ in range(BLOCK_RUNS):
        start = time.perf_counter()
        block()
        times.append(time.perf_counter() - start)
    with torch.no_grad():
        for _ in range(2):
            token()
        start = time.perf_counter()
        for _ in range(TOKENS):
            token()
        per_token = (time.perf_counter() - start) / TOKENS / num_layers
    return {
        f"attention block, batch {BATCH}, segment {SEGMENT}, memory {MEMORY}": 1e3 * statistics.median(times),
        f"generation, memory {GENERATION['mem_len']}, per layer and token": 1e3 * per_token,
    }


def _ours() -> tuple[Callable[[], None], Callable[[], None], int]:
    from hf_ouroboros.models.transfo_xl import TransfoXLCache, TransfoXLConfig, TransfoXLLMHeadModel
    from hf_ouroboros.models.transfo_xl.context import attention_context

    torch.manual_seed(0)
    config = TransfoXLConfig(
        **BLOCK, d_embed=512, d_inner=64, vocab_size=8, cutoffs=[], div_val=1, n_layer=1, mem_len=MEMORY, clamp_len=-1
    )
    attention = TransfoXLLMHeadModel(config).transformer.layers[0].dec_attn
    hidden = torch.randn(BATCH, SEGMENT, config.d_model, requires_grad=True)
    memory = torch.randn(BATCH, MEMORY, config.d_model)

    def block() -> None:
        context = attention_context(config, hidden, MEMORY)
        attention(hidden, context, memory)[0].sum().backward()

    model = TransfoXLLMHeadModel(TransfoXLConfig(**GENERATION, mem_init="zeros")).eval()
    cache, ids = TransfoXLCache(model.config), torch.zeros(1, 1, dtype=torch.int64)

    def token() -> None:
        model(ids, cache=cache, use_cache=True)

    return block, token, model.config.n_layer


def _reference() -> tuple[Callable[[], None], Callable[[], None], int]:
    import transformers
    from transformers.models.deprecated.transfo_xl import modeling_transfo_xl as reference

    if transformers.__version__ != "4.57.6":
        raise SystemExit(f"--reference_python has transformers {transformers.__version__}; 4.57.6 is needed")
    # Its forward calls type_as(dtype=...), which torch doesn't have (huggingface/transformers#29650).
    type_as = torch.Tensor.type_as
    torch.Tensor.type_as = lambda self, other=None, dtype=None: self.to(dtype) if dtype else type_as(self, other)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    attention = reference.RelPartialLearnableMultiHeadAttn(**BLOCK, dropout=0.1)
    torch.nn.init.normal_(attention.r_r_bias, 0.0, 0.02)
    torch.nn.init.normal_(attention.r_w_bias, 0.0, 0.02)
    hidden = torch.randn(SEGMENT, BATCH, BLOCK["d_model"], requires_grad=True)
    memory = torch.randn(MEMORY, BATCH, BLOCK["d_model"])
    encode = reference.PositionalEmbedding(BLOCK["d_model"])

    def block() -> None:
        positions = encode(torch.arange(MEMORY + SEGMENT - 1, -1, -1.0))
        mask = torch.ones(SEGMENT, MEMORY + SEGMENT, dtype=torch.bool).triu(1 + MEMORY)[:, :, None]
        attention(hidden, positions, attn_mask=mask, mems=memory)[0].sum().backward()

    model = reference.TransfoXLLMHeadModel(reference.TransfoXLConfig(**GENERATION)).eval()
    ids, mems = torch.zeros(1, 1, dtype=torch.int64), None

    def token() -> None:
        nonlocal mems
        mems = model(ids, mems=mems).mems

    return block, token, model.config.n_layer


if __name__ == "__main__":
    main()
