"""Training with a head that does not build its logits: one set of numbers for all schedules, stock's to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoders import SMALL, tiny
from trainer_helpers import assert_same, logged, ouroboros, stock, tiny_model, trained
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_ouroboros.partition import late_logits
from hf_ouroboros.partition.late_logits import ChunkedCrossEntropy, LateLogits


def model_of(kind: str) -> PreTrainedModel:
    """A model of the tests' vocabulary, always with the same weights."""
    known = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "pad_token_id": 0}
    config = tiny("llama", vocab_size=61) if kind == "llama" else AutoConfig.for_model(kind, **SMALL | known)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every loss that was computed in chunks."""
    found: list[int] = []
    apply = ChunkedCrossEntropy.apply
    monkeypatch.setattr(ChunkedCrossEntropy, "apply", lambda *args: (found.append(len(args[0])), apply(*args))[1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_schedules_agree(tmp_path: Path, stages: int, tied: bool, calls: list[int]) -> None:
    def run(schedule: str, **options: object) -> object:
        options = {"num_stages": stages, "devices": ["cpu:0", "cpu:1", "cpu:2"][:stages], "max_steps": 4, **options}
        return trained(tmp_path / schedule, {"model": tiny_model(tied)}, schedule=schedule, **options)

    expected = run("reference", fused_head="on")
    assert calls
    for schedule in ("pipelined", "lockstep"):
        found = run(schedule, fused_head="on")
        assert_same(expected, found)
        assert logged(found, "loss") == logged(expected, "loss")
    assert_same(run("1f1b", fused_head="on"), run("zero_bubble", fused_head="on"))
    calls.clear()
    plain = run("reference", fused_head="off")
    assert not calls
    assert logged(expected, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-3)


@pytest.mark.parametrize("stages", [1, 3])
def test_logits_are_never_made(tmp_path: Path, stages: int, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateLogits, "made", lambda self: pytest.fail("somebody looks at logits"))
    options = {"num_stages": stages, "devices": ["cpu:0", "cpu:1", "cpu:2"][:stages], "fused_head": "on"}
    trainer = trained(tmp_path, {"model": tiny_model(tied=False)}, prediction_loss_only=True, **options)
    assert trainer.evaluate()["eval_loss"] > 0 and calls


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_without_delay_as_stock(tmp_path: Path, kind: str, calls: list[int]) -> None:
    options = {"max_grad_norm": 0.0, "learning_rate": 1e-3}
    expected = stock(tmp_path / "stock", {"model": model_of(kind)}, **options)
    expected.train()
    found = trained(
        tmp_path / "ours",
        {"model": model_of(kind)},
        schedule="1f1b",
        num_stages=2,
        devices=["cpu:0", "cpu:1"],
        fused_head="on",
        **options,
    )
    assert calls
    assert logged(found, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-5)
    assert found.evaluate()["eval_loss"] > 0
    for name, value in expected.model.state_dict().items():
        assert torch.allclose(value, found.model.state_dict()[name], atol=1e-4), name


@pytest.mark.slow
def test_logits_that_are_capped_are_made(tmp_path: Path, calls: list[int]) -> None:
    run = [
        trained(
            tmp_path / fused,
            {"model": model_of("gemma2")},
            num_stages=2,
            devices=["cpu:0", "cpu:1"],
            fused_head=fused,
        )
        for fused in ("on", "off")
    ]
    assert_same(*run)
    assert not calls


@pytest.mark.slow
def test_a_loss_of_ones_own_sees_logits(tmp_path: Path, calls: list[int]) -> None:
    def own(outputs: object, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    run = [
        trained(
            tmp_path / fused, {"compute_loss_func": own}, num_stages=3, devices=["cpu:0", "cpu:1"], fused_head=fused
        )
        for fused in ("on", "off")
    ]
    assert_same(*run)
    assert not calls


def test_evaluation(tmp_path: Path, calls: list[int]) -> None:
    losses = []
    for fused in ("on", "off"):
        trainer = ouroboros(
            tmp_path / fused,
            num_stages=2,
            devices=["cpu:0", "cpu:1"],
            fused_head=fused,
            prediction_loss_only=True,
        )
        calls.clear()
        losses.append(trainer.evaluate()["eval_loss"])
        assert bool(calls) == (fused == "on")
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    trainer = ouroboros(tmp_path / "predict", num_stages=2, devices=["cpu:0", "cpu:1"], fused_head="on")
    calls.clear()
    assert trainer.predict(trainer.eval_dataset).predictions.shape[-1] == 61
    assert not calls


@pytest.mark.parametrize("large", [True, False])
def test_auto_goes_by_the_vocabulary(
    tmp_path: Path, large: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr("hf_ouroboros.hooks.loss.LARGE_VOCABULARY", 61)
    assert late_logits.LARGE_VOCABULARY == 16384
    trained(tmp_path, num_stages=2, devices=["cpu:0", "cpu:1"], max_steps=1)
    assert bool(calls) == large
