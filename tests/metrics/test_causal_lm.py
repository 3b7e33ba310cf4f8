from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_ouroboros.data import CompletionCollator, CompletionDataset, byte_tokenizer
from hf_ouroboros.metrics import causal_lm
from hf_ouroboros.metrics.causal_lm import CausalLMMetrics, compute_metrics, preprocess_logits_for_metrics


def random_batch(rows: int = 3, length: int = 7, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, length, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (rows, length), generator=generator)
    labels[0, :3] = labels[1, 5:] = -100
    return logits, labels


def expected_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The definition, in double precision over all tokens at once."""
    flat, targets = logits[:, :-1].reshape(-1, logits.shape[-1]).double(), labels[:, 1:].reshape(-1)
    loss = functional.cross_entropy(flat, targets).item()
    counted = targets != -100
    accuracy = (flat.argmax(-1) == targets)[counted].double().mean().item()
    return {"loss_per_token": loss, "perplexity": math.exp(loss), "token_accuracy": accuracy}


def evaluated(logits: Tensor, labels: Tensor) -> EvalPrediction:
    ids, nll = preprocess_logits_for_metrics(logits, labels)
    return EvalPrediction(predictions=(ids.numpy(), nll.numpy()), label_ids=labels.numpy())


@pytest.mark.parametrize("chunk", [1, 30, 2**24])
def test_preprocessing_shifts_and_keeps_one_number_per_token(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(causal_lm, "_CHUNK_ELEMENTS", chunk)
    logits, labels = random_batch()
    ids, nll = preprocess_logits_for_metrics((logits, "past_key_values"), labels)
    assert (ids.dtype, nll.dtype) == (torch.int32, torch.float32)
    assert torch.equal(ids.long(), logits.argmax(-1)[:, :-1])
    wanted = functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(nll, wanted)
    assert torch.all(nll[labels[:, 1:] == -100] == 0)


def test_preprocessing_computes_in_float32() -> None:
    logits, labels = random_batch()
    _, nll = preprocess_logits_for_metrics(logits.bfloat16(), labels)
    assert torch.equal(nll, preprocess_logits_for_metrics(logits.bfloat16().float(), labels)[1])


def test_preprocessing_without_labels_predicts_only() -> None:
    logits, _ = random_batch()
    assert torch.equal(preprocess_logits_for_metrics(logits, None).long(), logits.argmax(-1)[:, :-1])


def test_metrics_weigh_tokens() -> None:
    logits, labels = random_batch()
    # float32 sums of a handful of terms
    assert compute_metrics(evaluated(logits, labels)) == pytest.approx(expected_metrics(logits, labels), rel=1e-6)


def test_batches_add_up_and_a_result_starts_afresh() -> None:
    logits, labels = random_batch()
    metric, whole = CausalLMMetrics(), compute_metrics(evaluated(logits, labels))
    for _ in range(2):
        assert metric(evaluated(logits[:1], labels[:1]), compute_result=False) == {}
        assert metric(evaluated(logits[1:], labels[1:])) == pytest.approx(whole, rel=1e-12)


def test_separate_batches_of_different_length_are_accepted() -> None:
    logits, labels = random_batch()
    parts = [evaluated(logits[:1], labels[:1]), evaluated(logits[1:, :5], labels[1:, :5])]
    listed = EvalPrediction(
        predictions=[part.predictions for part in parts], label_ids=[part.label_ids for part in parts]
    )
    labels = labels.clone()
    labels[1:, 5:] = -100
    assert compute_metrics(listed) == pytest.approx(compute_metrics(evaluated(logits, labels)), rel=1e-12)


def test_perplexity_overflows_to_infinity() -> None:
    prediction = EvalPrediction(
        predictions=(np.zeros((1, 1)), np.full((1, 1), 1e4)), label_ids=np.zeros((1, 2), dtype=int)
    )
    assert compute_metrics(prediction)["perplexity"] == math.inf


def test_misuse_is_named() -> None:
    logits, labels = random_batch()
    with pytest.raises(ValueError, match="as preprocess_logits_for_metrics"):
        compute_metrics(EvalPrediction(predictions=logits.numpy(), label_ids=labels.numpy()))
    with pytest.raises(ValueError, match="No label to predict"):
        compute_metrics(evaluated(logits, torch.full_like(labels, -100)))


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_eval_metrics": True}, {"eval_do_concat_batches": False}, {"eval_accumulation_steps": 1}],
    ids=lambda options: next(iter(options), "default"),
)
def test_in_trainer_with_batches_of_different_length(tmp_path: Path, options: dict) -> None:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_positions=32, n_embd=8, n_layer=1, n_head=1, bos_token_id=256, eos_token_id=256)
    )
    examples = [{"prompt": "ab" * i, "completion": "xyz"[: 1 + i % 3]} for i in range(1, 8)]
    dataset = CompletionDataset(examples, tokenizer, max_length=32)
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, per_device_eval_batch_size=3, use_cpu=True, report_to=[], **options),
        eval_dataset=dataset,
        data_collator=CompletionCollator(tokenizer),
        compute_metrics=CausalLMMetrics() if "batch_eval_metrics" in options else compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )
    result = trainer.evaluate()
    batch = CompletionCollator(tokenizer)([*dataset])
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # The padding of a batch changes the order of float32 sums.
    expected = {f"eval_{name}": value for name, value in expected_metrics(logits, batch["labels"]).items()}
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_needs_neither_evaluate_nor_datasets() -> None:
    code = """
import sys
sys.path.insert(0, ".")
sys.modules["evaluate"] = sys.modules["datasets"] = None  # importing them now raises ImportError
from hf_ouroboros import metrics
import hf_ouroboros.metrics.causal_lm, hf_ouroboros.data
try:
    metrics.load("perplexity")
except ImportError as error:
    assert "pip install evaluate" in str(error)
else:
    raise SystemExit("loaded")
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
