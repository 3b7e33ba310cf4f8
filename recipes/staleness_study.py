"""What does delay cost, and what helps? Many small runs over stages, micro-batches, compensations and learning rates.

    python recipes/staleness_study.py --grid recipes/staleness_grids/screen.yaml --jobs 2    # runs what is missing
    python recipes/staleness_study.py --report                                                 # tables and pictures

Every run is an `OuroborosTrainer` with `schedule="reference"` on one device and one thread: the numbers are those of every
other schedule. A run leaves one JSON file in `output_dir`, named by its settings; runs that are there are not repeated, so the
study can be stopped and started, and extended, at any time. Learning rates are chosen on validation text, what is reported
is the loss on test text.

A grid is a YAML file: `defaults` for all runs, and `runs`, a list of mappings from fields of `Setting` to a value or a list of
values; each mapping stands for all combinations of its lists. To fine-tune, give `start_from`, a byte-level checkpoint of
another corpus (recipes/pretrain_lm.py makes one).
"""

from __future__ import annotations

import json
import logging as python_logging
import math
import os
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from adapters import with_lora
from architectures import default_config, make, small_model
from common import OptionError, run_recipe
from staleness_report import write_report
from staleness_setting import Setting, StudyArguments, read_grid
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PretrainedConfig,
    PrinterCallback,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

import hf_ouroboros
from hf_ouroboros import OuroborosArguments, OuroborosTrainer
from hf_ouroboros.data import BYTE_VOCAB_SIZE, PackedBlocks, StreamCollator, StreamSegments, default_corpus
from hf_ouroboros.models.transfo_xl import TransfoXLConfig

EVAL_ROWS = 16


def read_text(train_file: str | None) -> tuple[bytes, bytes, bytes]:
    """Training, validation and test text."""
    if train_file is not None:
        text = Path(train_file).read_bytes()
        first, second = len(text) * 90 // 100, len(text) * 95 // 100
        return text[:first], text[first:second], text[second:]
    corpus = default_corpus(4_000_000)
    held_out = "".join(corpus.validation_texts).encode()
    return "".join(corpus.train_texts).encode(), held_out[: len(held_out) // 2], held_out[len(held_out) // 2 :]


def tokens_of(text: bytes) -> torch.Tensor:
    """Its bytes, uint8 [tokens]."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@dataclass(frozen=True)
class Examples:
    """What a model is trained and measured on: blocks in random order, or contiguous columns where it has a memory.

    Args:
        setting: of the run; its model decides.
    """

    setting: Setting

    @property
    def in_columns(self) -> bool:
        """Whether the text is read in its own order."""
        return self.setting.model == "transfo-xl"

    def train(self, text: bytes) -> PackedBlocks | StreamSegments:
        """Rows for training."""
        tokens = tokens_of(text)
        if not self.in_columns:
            return PackedBlocks(tokens, self.setting.block_size)
        found = StreamSegments(tokens, self.setting.rows, self.setting.block_size)
        if found.segments < self.setting.updates:
            raise OptionError(
                f"updates={self.setting.updates} is more than the {found.segments} segments of a column; give more text"
            )
        return found

    def held_out(self, text: bytes, tokens: int) -> PackedBlocks | StreamSegments:
        """Rows to measure the loss of the first `tokens`."""
        if not self.in_columns:
            return PackedBlocks(tokens_of(text[:tokens]), self.setting.block_size)
        return StreamSegments(tokens_of(text[:tokens]), EVAL_ROWS, self.setting.block_size, keep_tail=True)

    @property
    def options(self) -> dict[str, Any]:
        """Trainer options that go with them."""
        return {"train_sampling_strategy": "sequential", "dataloader_drop_last": True} if self.in_columns else {}

    @property
    def collator(self) -> Any:
        """What makes batches of rows."""
        return StreamCollator() if self.in_columns else default_data_collator


def make_model(setting: Setting) -> Any:
    """The model to be trained, without dropout; with adapters, if there are to be any."""
    if setting.start_from:
        model = AutoModelForCausalLM.from_pretrained(setting.start_from, dtype="float32")
    else:
        model = AutoModelForCausalLM.from_config(config_of(setting))
    return with_lora(model, setting.lora_rank) if setting.lora_rank else model


def config_of(setting: Setting) -> PretrainedConfig:
    """Configuration of a model from scratch.

    Raises:
        OptionError: the type does not take these sizes.
    """
    if setting.model == "transfo-xl":
        return TransfoXLConfig(
            vocab_size=BYTE_VOCAB_SIZE,
            cutoffs=[],
            div_val=1,
            d_model=setting.width,
            d_embed=setting.width,
            n_head=setting.heads,
            d_head=setting.width // setting.heads,
            d_inner=setting.width * 7 // 2,  # with the projection of positions: the weights of GPT-2
            n_layer=setting.layers,
            mem_len=setting.block_size,
            clamp_len=2 * setting.block_size,
            same_length=False,
            dropout=0.0,
            dropatt=0.0,
            init_std=setting.init_std,
            eos_token_id=None,
        )
    if setting.model != "gpt2":
        default = default_config("model", setting.model)
        values = small_model(default, setting.width, setting.heads, setting.layers, setting.init_std)
        values |= {"vocab_size": BYTE_VOCAB_SIZE, "pad_token_id": None}
        return make(default, values | {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True})
    return AutoConfig.for_model(
        setting.model,
        vocab_size=BYTE_VOCAB_SIZE,
        n_layer=setting.layers,
        n_embd=setting.width,
        n_head=setting.heads,
        n_positions=setting.block_size,
        activation_function="gelu_pytorch_tanh",
        initializer_range=setting.init_std,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def run(setting: Setting, options: StudyArguments) -> dict[str, Any]:
    """Trains and returns losses in bits per byte; None where the run diverged."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    python_logging.getLogger("hf_ouroboros").setLevel(python_logging.ERROR)  # about the delay: it is what is studied
    train, validation, test = read_text(options.train_file)
    examples = Examples(setting)
    set_seed(setting.seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = OuroborosArguments(
            output_dir=folder,
            schedule="reference",
            num_stages=setting.stages,
            devices=[options.device],
            use_cpu=options.device.startswith("cpu"),
            gradient_accumulation_steps=setting.micro_batches,
            per_device_train_batch_size=setting.rows // setting.micro_batches,
            per_device_eval_batch_size=EVAL_ROWS,
            **examples.options,
            max_steps=setting.updates,
            learning_rate=setting.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=setting.warmup_updates,
            delay_warmup_steps=setting.delay_warmup_updates,
            delay_compensation=setting.compensation,
            delay_compensation_args=setting.compensation_args or None,
            optim=setting.optim,
            optim_args=setting.optim_args or None,
            adam_beta1=setting.adam_beta1,
            adam_beta2=setting.adam_beta2,
            weight_decay=setting.weight_decay,
            max_grad_norm=setting.max_grad_norm,
            tied_gradient=setting.tied_gradient,
            weights=setting.weights,
            seed=setting.seed,
            eval_strategy="steps",
            eval_steps=min(options.eval_updates, setting.updates),
            logging_steps=options.eval_updates,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = OuroborosTrainer(
            model=make_model(setting),
            args=args,
            train_dataset=examples.train(train),
            eval_dataset=examples.held_out(validation, options.eval_tokens),
            data_collator=examples.collator,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds = time.perf_counter() - start
        evaluated = [e for e in trainer.state.log_history if "eval_loss" in e]
        end = trainer.evaluate(examples.held_out(test, options.test_tokens), metric_key_prefix="test")
    return {
        "setting": asdict(setting),
        "data": data_name(options.train_file),
        "tokens_per_update": setting.rows * setting.block_size,
        "curve": [(entry["step"], bits(entry["eval_loss"])) for entry in evaluated],
        "validation": bits(evaluated[-1]["eval_loss"]),
        "test": bits(end["test_loss"]),
        "seconds": round(seconds, 1),
        "versions": {"hf_ouroboros": hf_ouroboros.__version__, "torch": torch.__version__},
    }


def bits(nats: float) -> float | None:
    """Bits per byte; None if it is no number."""
    return nats / math.log(2) if math.isfinite(nats) else None


def data_name(train_file: str | None) -> str:
    """What tells one corpus from another in the results."""
    return "standard library" if train_file is None else Path(train_file).name


def missing_runs(options: StudyArguments) -> dict[Path, Setting]:
    """The runs of the grids that have left no result yet."""
    folder, data = Path(options.output_dir), data_name(options.train_file)
    wanted = {folder / s.name(data): s for path in options.grid for s in read_grid(path)}
    return {path: setting for path, setting in wanted.items() if not path.exists()}


def run_all(options: StudyArguments) -> int:
    """Runs what is missing; returns how many failed."""
    missing = missing_runs(options)
    print(f"{len(missing)} runs to do", flush=True)
    if options.dry_run:
        print(*sorted(path.name for path in missing), sep="\n")
        return 0
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    failed = 0
    # Threads of numeric libraries are counted when a process starts.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures: dict[Future, Path] = {pool.submit(run, setting, options): path for path, setting in missing.items()}
        for done, future in enumerate(as_completed(futures), 1):
            path = futures[future]
            try:
                result = future.result()
            except Exception as error:  # one run's failure must not end the study
                failed += 1
                print(f"[{done}/{len(futures)}] {path.stem} FAILED: {type(error).__name__}: {error}", flush=True)
                continue
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            partial.rename(path)
            value = "diverged" if result["test"] is None else f"{result['test']:.4f} bits per byte"
            print(f"[{done}/{len(futures)}] {path.stem}: {value} in {result['seconds']:.0f} s", flush=True)
    return failed


def main() -> None:
    """Runs and reports."""
    (options,) = HfArgumentParser(StudyArguments, description=__doc__).parse_args_into_dataclasses()
    if not options.grid and not options.report:
        raise SystemExit("nothing to do: give --grid FILE.yaml to run, --report to see what was run")
    failed = run_all(options) if options.grid else 0
    if options.report:
        print(write_report(Path(options.output_dir)))
    if failed:
        raise SystemExit(f"{failed} runs failed; start again to repeat them")


if __name__ == "__main__":
    run_recipe(main)
