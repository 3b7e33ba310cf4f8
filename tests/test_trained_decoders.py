"""What people fine-tune, trained: every schedule's numbers are the reference's, and without delay stock Trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rig import in_processes
from tiny_decoders import tiny_decoder
from trainer_helpers import EVERY, Rows, assert_same, differing, outcome, split_options, stock, trained
from trainer_runs import held, whole
from transformers import AutoModelForCausalLM, PreTrainedModel

TIED = {"tie_word_embeddings": True}
# type, tied or not, and dropout where the type has it (as a number given to a function, not a module)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_dropout": 0.2}),
    "llama, tied": ("llama", TIED),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {"attention_dropout": 0.1}),
    "gemma3n": ("gemma3n_text", {}),
    "mistral with a sliding window": ("mistral", {}),
    "phi3": ("phi3", {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {"hidden_dropout": 0.1}),
    "mixtral": ("mixtral", {}),
    "mixtral, balanced": ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.1}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gpt_oss": ("gpt_oss", {}),
}
SYNCHRONOUS = {"schedule": "1f1b", "max_grad_norm": 0.0}
RUN: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, **split_options(3, 2)}


def made(kind: str) -> PreTrainedModel:
    """A small model of a kind."""
    model_type, options = KINDS[kind]
    return tiny_decoder(model_type, **options)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pipelined_is_the_reference_and_resumes(kind: str, tmp_path: Path) -> None:
    expected = outcome(trained(tmp_path / "reference", {"model": made(kind)}, schedule="reference", **RUN))
    found = outcome(trained(tmp_path / "pipelined", {"model": made(kind)}, **RUN))
    assert differing(expected, found) == []
    resume = tmp_path / "reference" / "checkpoint-2"  # crossed over, too
    unsaved = {**RUN, "save_strategy": "no"}
    again = outcome(trained(tmp_path / "resumed", {"model": made(kind)}, resume=resume, **unsaved))
    assert differing(expected, again) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama, tied", "gemma3n", "mixtral, balanced"])
def test_lockstep_and_recompute_are_the_reference(kind: str, tmp_path: Path) -> None:
    options = {"max_steps": 3, **split_options(3, 2)}
    expected = outcome(trained(tmp_path / "reference", {"model": made(kind)}, schedule="reference", **options))
    for given in ({"schedule": "lockstep"}, {"recompute": True}):
        assert (
            differing(expected, outcome(trained(tmp_path / "found", {"model": made(kind)}, **given, **options))) == []
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "olmo2", "gpt_oss", "mixtral", "mixtral, balanced"])
def test_without_delay_it_is_stock_trainer(kind: str, tmp_path: Path) -> None:
    """Untied, without clipping and dropout: nothing is added up in another order."""
    expected = stock(tmp_path / "stock", {"model": made(kind)}, max_steps=2, max_grad_norm=0.0)
    expected.train()
    assert_same(
        expected, trained(tmp_path / "1f1b", {"model": made(kind)}, max_steps=2, **SYNCHRONOUS, **split_options(3, 2))
    )


def train_part(rank: int, folder: str, kinds: list[str]) -> list[dict[str, Any]]:
    """One process's part in runs of some kinds."""
    found = []
    for i, kind in enumerate(kinds):
        options = {"max_steps": 3, "num_stages": 3, "save_strategy": "steps", "save_steps": 2}
        trainer = trained(f"{folder}/{i}", {"model": made(kind)}, **options)
        trainer.save_model(f"{folder}/{i}/saved")
        again = trained(f"{folder}/{i}", {"model": made(kind)}, resume=f"{folder}/{i}/checkpoint-2", **options)
        found += [held(trainer), held(again)]
    return found


@pytest.mark.slow
def test_two_processes_are_the_reference(tmp_path: Path) -> None:
    """Saved, resumed and read again; Gemma 3n carries embeddings per layer, keys and values from process to process."""
    kinds = ["llama, tied", "gemma3", "gemma3n", "mixtral, balanced"] if EVERY else ["gemma3n", "mixtral, balanced"]
    parts = in_processes(2, train_part, str(tmp_path), kinds)
    for i, kind in enumerate(kinds):
        runs = [whole([part[2 * i + j] for part in parts]) for j in (0, 1)]
        reference = trained(
            tmp_path / "reference", {"model": made(kind)}, schedule="reference", max_steps=3, **split_options(3, 2)
        )
        expected = held(reference)
        for found in runs:
            for key in ("weights", "optimizer"):
                assert differing(expected[key], found[key]) == [], (kind, key)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / str(i) / "saved")
        assert differing(reference.model.state_dict(), saved.state_dict()) == [], kind


def test_rows_are_padded() -> None:
    """The data of all runs here have masks, so that padding is covered."""
    assert "attention_mask" in Rows(3)[0] and int(Rows(3)[0]["attention_mask"].sum()) < 10
