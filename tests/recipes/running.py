"""Runs the recipes as a user does, each in a process of its own, on settings of a few seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = {
    "config_overrides": "n_layer=4,n_embd=32,n_head=2,resid_pdrop=0.1",
    "block_size": 32,
    "max_train_bytes": 20_000,
    "max_steps": 4,
    "sample_tokens": 40,
    "eval_strategy": "no",
}

PLAIN_LOAD = """
import sys
sys.modules["hf_ouroboros"] = None  # importing it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
output = model.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=4, do_sample=False)
print(tokenizer.decode(output[0]))
"""


def options(values: Mapping[str, object]) -> list[str]:
    """Options as they are written on a command line."""
    return [f"--{name}={value}" for name, value in values.items()]


def run(
    command: list[str], folder: Path, env: Mapping[str, str] | None = None, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a Python command in a folder, without network; asserts that it succeeds, or that it fails."""
    env = dict(env or os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    env |= {"OMP_NUM_THREADS": "2", "HF_DATASETS_CACHE": str(folder / "datasets"), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, timeout=240, capture_output=True, text=True, encoding="utf-8"
    )
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def recipe(name: str, folder: Path, values: Mapping[str, object] | None = None, **how: object):
    """Runs a recipe with options."""
    return run([str(RECIPES / name), *options(values or {})], folder, **how)
