"""What stages cost on an accelerator, beside the stock Trainer with the whole model: one command, one table.

    python tests/gpu/measure.py                     # Llama of 0.36 billion parameters, bfloat16
    python tests/gpu/measure.py --hidden 256        # a small one, where launching kernels takes longer than they do

Where there are fewer accelerators than stages, stages share them: then nobody can be faster than the stock Trainer, and the
table tells what splitting, weight versions and handing over cost. All runs are in one process, one after the other.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_runs import KIND, workers

from hf_ouroboros import OuroborosArguments, OuroborosTrainer


class Tokens(Dataset):
    """Random rows."""

    def __init__(self, rows: int, length: int, vocabulary: int):
        self.ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Clock(TrainerCallback):
    """Notes when the first and the last update of the measured part were there."""

    def __init__(self, first: int, last: int):
        self.first, self.last, self.times = first, last, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.first, self.last):
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--micro_batches", type=int, default=4)
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--fused_head", choices=["on", "off"], nargs="+", default=["on"])
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4 // 8 * 8,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        max_position_embeddings=options.length,
        tie_word_embeddings=False,
    )
    rows = Tokens(options.rows * options.micro_batches * options.updates, options.length, options.vocabulary)
    first, last = options.updates // 3, options.updates
    tokens = options.rows * options.length * options.micro_batches * (last - first)

    def measure(cls: type[Trainer], **more: Any) -> tuple[float, float, float]:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        kind = TrainingArguments if cls is Trainer else OuroborosArguments
        with tempfile.TemporaryDirectory() as folder:
            args = kind(
                output_dir=folder,
                per_device_train_batch_size=options.rows,
                gradient_accumulation_steps=options.micro_batches,
                max_steps=options.updates,
                logging_steps=options.updates,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                learning_rate=1e-4,
                max_grad_norm=0.0,
                **more,
            )
            model = LlamaForCausalLM(config).bfloat16()
            if cls is Trainer:
                model = model.to(KIND)
            clock = Clock(first, last)
            trainer = cls(model=model, args=args, train_dataset=rows, callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        peak = torch.cuda.max_memory_allocated() / sum(p.numel() for p in model.parameters())
        return tokens / (clock.times[-1] - clock.times[0]), peak, losses[-1]

    count = sum(p.numel() for p in LlamaForCausalLM(config.__class__(**config.to_dict())).parameters())
    lines = [("stock Trainer, whole model", *measure(Trainer))]
    for stages in options.stages:
        for schedule in ("1f1b", "pipelined") if stages > 1 else ("pipelined",):
            for fused in options.fused_head:
                split = {"num_stages": stages, "devices": workers(stages), "schedule": schedule, "fused_head": fused}
                lines.append((f"{schedule}, K = {stages}, fused head {fused}", *measure(OuroborosTrainer, **split)))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {count / 1e6:.0f} million parameters, bfloat16,")
    print(f"{options.rows} x {options.length} tokens, M = {options.micro_batches}, {last - first} updates measured")
    print("| run | tokens/s | beside stock | peak bytes per parameter | last loss |\n|---|---|---|---|---|")
    for name, speed, peak, loss in lines:
        print(f"| {name} | {speed:,.0f} | {speed / lines[0][1]:.2f} | {peak:.1f} | {loss:.3f} |")


if __name__ == "__main__":
    main()
