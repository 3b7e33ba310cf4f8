"""Encoder-decoder models, trained: every schedule's numbers are the reference's, and without delay stock Trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rig import in_processes
from tiny_decoders import tiny_encoder_decoder
from torch.utils.data import Dataset
from trainer_helpers import EVERY, assert_same, differing, outcome, split_options, stock, trained
from trainer_runs import held, whole
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Seq2SeqTrainingArguments,
)

from hf_ouroboros import (
    AutoStagedModelForSeq2SeqLM,
    OuroborosArguments,
    OuroborosTrainer,
    UnsupportedOptionError,
)

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {}),
    "t5, dropout": ("t5", {"dropout_rate": 0.1}),
    "bart": ("bart", {"encoder_layers": 3, "decoder_layers": 3}),
    "switch": ("switch_transformers", {}),
}
RUN: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, **split_options(4, 2)}


class Pairs(Dataset):
    """Texts of ten tokens, some of them padded, and what is to become of them: seven tokens or fewer."""

    def __init__(self, count: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 61, (count, 10), generator=generator)
        self.labels = torch.randint(3, 61, (count, 7), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask, labels = torch.ones(10, dtype=torch.long), self.labels[index].clone()
        if index % 3 == 0:
            mask[6 + index % 3 :], labels[3 + index % 4 :] = 0, -100
        return {"input_ids": self.ids[index], "attention_mask": mask, "labels": labels}


def made(kind: str) -> PreTrainedModel:
    """A small model of a kind.

    T5's decoder has a configuration of its own, in which stock Trainer leaves the cache on: other kernels, other rounding.
    """
    model_type, options = KINDS[kind]
    model = tiny_encoder_decoder(model_type, **options)
    model.get_decoder().config.use_cache = False
    return model


def given(kind: str, **more: Any) -> dict[str, Any]:
    """What a trainer is given."""
    return {"model": made(kind), "train_dataset": Pairs(18), "eval_dataset": Pairs(10, seed=1), **more}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pipelined_is_the_reference_and_resumes(kind: str, tmp_path: Path) -> None:
    expected = outcome(trained(tmp_path / "reference", given(kind), schedule="reference", **RUN))
    found = outcome(trained(tmp_path / "pipelined", given(kind), **RUN))
    assert differing(expected, found) == []
    resume = tmp_path / "reference" / "checkpoint-2"  # crossed over, too
    again = outcome(trained(tmp_path / "resumed", given(kind), resume=resume, **{**RUN, "save_strategy": "no"}))
    assert differing(expected, again) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"schedule": "lockstep"}, {"recompute": True}, {"schedule": "lockstep", "tied_gradient": "paper"}],
    ids=str,
)
def test_other_ways_are_the_reference(options: dict[str, Any], tmp_path: Path) -> None:
    run = {"max_steps": 3, **split_options(4, 2)}
    tied = {"tied_gradient": options.get("tied_gradient", "joint")}
    expected = outcome(trained(tmp_path / "a", given("t5, dropout"), schedule="reference", **run, **tied))
    assert differing(expected, outcome(trained(tmp_path / "b", given("t5, dropout"), **run, **options))) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart", "switch"])
def test_without_delay_it_is_stock_trainer(kind: str, tmp_path: Path) -> None:
    options = {"max_steps": 2, "max_grad_norm": 0.0}
    expected = stock(tmp_path / "stock", given(kind), **options)
    expected.train()
    found = trained(tmp_path / "1f1b", given(kind), schedule="1f1b", **options, **split_options(4, 2))
    assert_same(expected, found)


def test_decoder_inputs_of_a_collator_and_smoothed_labels(tmp_path: Path) -> None:
    """The collator makes decoder inputs, which a smoothed loss needs, as in stock Trainer."""

    class Tokenizer:
        padding_side, model_input_names = "right", ["input_ids", "attention_mask"]

        def pad(self, features: list[dict[str, Any]], **_: Any) -> dict[str, torch.Tensor]:
            return {
                key: torch.stack([torch.as_tensor(f[key]) for f in features]) for key in features[0] if key != "labels"
            }

    class Lists(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {key: value.tolist() for key, value in super().__getitem__(index).items()}

    def smoothed() -> dict[str, Any]:
        whole = given("bart", train_dataset=Lists(18))
        return {**whole, "data_collator": DataCollatorForSeq2Seq(Tokenizer(), model=whole["model"])}

    options = {"max_steps": 2, "max_grad_norm": 0.0, "label_smoothing_factor": 0.1}
    expected = stock(tmp_path / "stock", smoothed(), **options)
    expected.train()
    assert_same(expected, trained(tmp_path / "1f1b", smoothed(), schedule="1f1b", **options, **split_options(4, 2)))


def test_evaluation_and_card(tmp_path: Path) -> None:
    trainer = trained(tmp_path, given("t5"), max_steps=1, **split_options(4, 2))
    prediction = trainer.predict(Pairs(8, seed=2))
    assert prediction.predictions.shape == (8, 7, trainer.model.config.vocab_size)
    batch = {key: torch.stack([row[key] for row in Pairs(8, seed=2)]) for key in Pairs(1)[0]}
    with torch.no_grad():
        expected = trainer.model.eval()(**batch)
    assert torch.equal(torch.from_numpy(prediction.predictions), expected.logits)
    assert prediction.metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-6)
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "`t5` encoder-decoder language model" in text and "pipeline_tag: text2text-generation" in text
    assert "AutoModelForSeq2SeqLM.from_pretrained(" in text and "Causal" not in text


@pytest.mark.slow
def test_the_card_of_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `peft`: pip install -e '.[peft]'")
    model = peft.get_peft_model(made("t5"), peft.LoraConfig(r=2, target_modules=["q", "v"]))
    trainer = trained(tmp_path, {**given("t5"), "model": model}, max_steps=1, **split_options(4, 2))
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert (
        "adapter of a `t5` encoder-decoder language model" in text
        and "= AutoModelForSeq2SeqLM.from_pretrained(" in text
    )


def test_generating_while_evaluating_is_refused(tmp_path: Path) -> None:
    args = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, use_cpu=True, report_to=[])
    with pytest.raises(UnsupportedOptionError, match=r"predict_with_generate=True is not supported.*generate\(\)"):
        OuroborosTrainer(model=made("t5"), args=args)


def train_part(rank: int, folder: str, kinds: list[str]) -> list[dict[str, Any]]:
    """One process's part in runs of some kinds, the second one loaded and resumed in parts."""
    found = []
    for i, kind in enumerate(kinds):
        options = {"max_steps": 3, "num_stages": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = trained(f"{folder}/{i}", given(kind), **options)
        trainer.save_model(f"{folder}/{i}/saved")
        args = OuroborosArguments(f"{folder}/{i}/loaded", num_stages=4, use_cpu=True, report_to=[])
        model = AutoStagedModelForSeq2SeqLM.from_pretrained(f"{folder}/{i}/saved", args=args)
        assert any(p.is_meta for p in model.parameters()) and any(not p.is_meta for p in model.parameters())
        again = trained(f"{folder}/{i}", given(kind, model=model), resume=f"{folder}/{i}/checkpoint-2", **options)
        found += [held(trainer), held(again)]
    return found


@pytest.mark.slow
def test_two_processes_are_the_reference(tmp_path: Path) -> None:
    kinds = ["t5", "bart"] if EVERY else ["t5"]
    parts = in_processes(2, train_part, str(tmp_path), kinds)
    for i, kind in enumerate(kinds):
        reference = trained(tmp_path / "ref", given(kind), schedule="reference", max_steps=3, **split_options(4, 2))
        expected = held(reference)
        for j in (0, 1):
            found = whole([part[2 * i + j] for part in parts])
            for key in ("weights", "optimizer"):
                assert differing(expected[key], found[key]) == [], (kind, j, key)
        saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / str(i) / "saved")
        assert differing(reference.model.state_dict(), saved.state_dict()) == [], kind
