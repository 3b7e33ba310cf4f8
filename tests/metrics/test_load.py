from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_ouroboros import metrics

evaluate = pytest.importorskip("evaluate")


@pytest.fixture
def load(tmp_path: Path):
    return lambda name: metrics.load(name, cache_dir=str(tmp_path), keep_in_memory=True)


def test_unknown_names_are_told_the_known_ones() -> None:
    with pytest.raises(metrics.UnknownMetricError, match="'bleu'.*bits_per_character, perplexity, token_accuracy"):
        metrics.load("bleu")


@pytest.mark.parametrize("name", metrics.METRICS)
def test_every_metric_loads_from_its_folder_and_describes_itself(name: str, load) -> None:
    module = load(name)
    assert module.name == name
    assert "Args:" in module.inputs_description and module.description.strip()
    assert type(module).__module__.startswith("evaluate_modules")


@pytest.mark.parametrize("name", metrics.METRICS)
def test_the_example_in_the_description_is_true(name: str, load) -> None:
    module = load(name)
    example = module.inputs_description.split("Example:")[1].strip()
    call, expected = example.removeprefix(">>> ").split("\n")
    assert eval(call, {name: module}) == pytest.approx(eval(expected))


def test_perplexity_weighs_tokens_not_sequences(load) -> None:
    result = load("perplexity").compute(nll=[10.0, 1.0], tokens=[100, 1])
    assert result == {"perplexity": math.exp(11 / 101), "loss_per_token": 11 / 101}


def test_perplexity_overflows_to_infinity(load) -> None:
    assert load("perplexity").compute(nll=[1e4], tokens=[1])["perplexity"] == math.inf


def test_bits_per_character_of_a_fair_coin_is_one(load) -> None:
    assert load("bits_per_character").compute(nll=[8 * math.log(2)], characters=[8]) == {"bits_per_character": 1.0}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_batches_add_up_whatever_they_are_made_of(load, kind) -> None:
    perplexity, bits = load("perplexity"), load("bits_per_character")
    for nll, count in (([1.0, 2.0], [3, 4]), ([5.0], [1])):
        perplexity.add_batch(nll=kind(nll), tokens=kind(count))
        bits.add_batch(nll=kind(nll), characters=kind(count))
    assert perplexity.compute()["loss_per_token"] == 1.0
    assert bits.compute()["bits_per_character"] == pytest.approx(1 / math.log(2), rel=1e-15)


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        ([[5, 6, 7], [8]], [[-100, 6, 1], [8]]),
        ([[5, 6], [7, 8]], [[-100, 6], [1, 8]]),
        ([5, 6, 7, 8], [-100, 6, 1, 8]),
    ],
    ids=["ragged", "rectangular", "flat"],
)
def test_token_accuracy_ignores_masked_labels(load, predictions: list, references: list) -> None:
    module = load("token_accuracy")
    assert module.compute(predictions=predictions, references=references) == {"token_accuracy": 2 / 3}
    for predicted, labels in zip(predictions, references, strict=True):
        module.add(prediction=predicted, reference=labels)
    assert module.compute() == {"token_accuracy": 2 / 3}


def test_token_accuracy_of_tensors(load) -> None:
    module = load("token_accuracy")
    module.add_batch(predictions=torch.tensor([[1, 2]]), references=torch.tensor([[1, 3]]))
    module.add_batch(predictions=np.array([[4, 5, 6]]), references=np.array([[4, 5, -100]]))
    assert module.compute() == {"token_accuracy": 0.75}


def test_nothing_to_count_is_an_error(load) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        load("perplexity").compute(nll=[0.0], tokens=[0])
    with pytest.raises(ValueError, match="at least one character"):
        load("bits_per_character").compute(nll=[0.0], characters=[0])
    with pytest.raises(ValueError, match="no label but -100"):
        load("token_accuracy").compute(predictions=[[1]], references=[[-100]])
    with pytest.raises(ValueError, match="Sequence 1 has 2 predictions but 1 references"):
        load("token_accuracy").compute(predictions=[[1], [1, 2]], references=[[1], [1]])


def test_metrics_combine(load) -> None:
    combined = evaluate.combine([load(name) for name in metrics.METRICS])
    inputs = {"nll": [2.0, 4.0], "tokens": [1, 2], "characters": [4, 8]}
    ids = {"predictions": [[1], [2, 3]], "references": [[1], [2, 4]]}
    expected = {
        "perplexity": math.exp(2.0),
        "loss_per_token": 2.0,
        "bits_per_character": 6 / (12 * math.log(2)),
        "token_accuracy": 2 / 3,
    }
    assert combined.compute(**ids, **inputs) == pytest.approx(expected, rel=1e-15)
    combined.add_batch(**ids, **inputs)
    assert combined.compute() == pytest.approx(expected, rel=1e-15)
