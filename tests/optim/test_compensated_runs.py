"""Every compensation under every schedule gives the reference's numbers, to the last bit; so does a resumed run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import Case, Run, assert_same_run, differences, oracle, tiny_gpt2
from trainer_helpers import EVERY

# compensation and optimizer; options behind a colon
KINDS = {
    "nesterov": ("none", "nesterov"),
    "muon": ("none", "muon"),
    "rotated": ("none", "rotated"),
    "prediction rotated": ("weight_prediction", "rotated"),
    "prediction sgd": ("weight_prediction", "sgd"),
    "prediction adamw": ("weight_prediction", "adamw"),
    "prediction muon": ("weight_prediction", "muon"),
    "prediction of steps, nadam": ("weight_prediction:prediction=step", "nadam"),
    "prediction of steps, muon": ("weight_prediction+error_feedback:prediction=step", "muon"),
    "rescale": ("lr_rescale", "adafactor"),
    "gap": ("gap_aware", "adamw"),
    "feedback": ("error_feedback", "nadam"),
    "prediction and rescale": ("weight_prediction+lr_rescale", "adamw"),
    "gap and rescale with muon": ("gap_aware+lr_rescale", "muon"),
    "prediction and feedback": ("weight_prediction+error_feedback", "adamw"),
    "everything with muon": ("weight_prediction+error_feedback+lr_rescale", "muon"),
    "measured muon": ("none", "measured muon"),
    "prediction and rescale with measured muon": (
        "weight_prediction+lr_rescale:anneal=0,rescaled=adamw",
        "measured muon",
    ),
    "feedback and rescale with muon": ("error_feedback+lr_rescale", "muon"),
}
SHAPES = {
    "tied": Case(3, updates=(1,) * 7),
    "untied, clipped": Case(4, updates=(1,) * 7, tied=False, clip=0.5, dropout=0.1),
    "ragged, padded": Case(3, updates=(2, 2, 1, 2, 2), clip=0.5, padded=True),
    "warm-up, recompute": Case(4, updates=(3, 3, 3, 3, 2), warmup=2, recompute=True, dropout=0.1),
    "warm-up, two ticks": Case(3, updates=(2,) * 6, warmup=2, recompute=True, dropout=0.1),
    "warm-up, one tick": Case(4, updates=(1,) * 9, warmup=3),
    "two stages": Case(2, updates=(1,) * 5, devices=1),
}
LOOKS = {1: "synchronize", 2: "norm", 3: "settle", 4: "state"}


def case(kind: str, shape: str) -> Case:
    return compensated(SHAPES[shape], kind)


def compensated(plain: Case, kind: str) -> Case:
    """A case with the compensation and the optimizer of this kind."""
    text, optimizer = KINDS[kind]
    compensation, _, options = text.partition(":")
    return dataclasses.replace(plain, compensation=compensation, compensation_args=options, optimizer=optimizer)


def freeze_some(model: torch.nn.Module) -> None:
    model.transformer.h[0].requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)


# Every kind, and every shape with several kinds.
PAIRS = [
    (kind, list(SHAPES)[(i + j) % len(SHAPES)]) for i, kind in enumerate(KINDS) for j in ((0, 3) if EVERY else (0,))
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shape"), PAIRS)
def test_schedules_agree(kind: str, shape: str) -> None:
    expected = oracle(case(kind, shape), looks=LOOKS)
    both = EVERY or PAIRS.index((kind, shape)) % 3 == 0
    for schedule in ("pipelined", "lockstep") if both else ("pipelined",):
        assert_same_run(expected, Run(case(kind, shape), schedule).train(LOOKS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_they_do_something(kind: str) -> None:
    """Against the same optimizer alone; K = 4, M = 1."""
    compensation, optimizer = KINDS[kind]
    plain = dataclasses.replace(SHAPES["tied"], stages=4, optimizer="adamw" if compensation == "none" else optimizer)
    mine = compensated(plain, kind)
    expected, found = oracle(plain), oracle(mine)
    assert differences(expected.model.state_dict(), found.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind, (compensation, _) in KINDS.items() if compensation != "none"])
def test_without_delay_they_do_nothing(kind: str) -> None:
    plain = Case(3, updates=(2, 1, 2, 2), optimizer=KINDS[kind][1])
    mine = compensated(plain, kind)
    expected = oracle(plain, "1f1b")
    for schedule in ("1f1b", "reference 1f1b"):
        found = Run(mine, schedule).train()
        assert found.losses == expected.losses
        assert differences(expected.model.state_dict(), found.model.state_dict()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prediction muon", "gap and rescale with muon", "feedback", "prediction and rescale"])
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep"])
def test_frozen_layers(kind: str, schedule: str) -> None:
    expected = Run(case(kind, "tied"), "reference", freeze_some).train()
    assert_same_run(expected, Run(case(kind, "tied"), schedule, freeze_some).train())
    assert torch.equal(expected.model.transformer.wpe.weight, tiny_gpt2().transformer.wpe.weight)


@pytest.mark.parametrize(("tied_gradient", "scope"), [("paper", "stage"), ("joint", "global")])
def test_prediction_with_the_papers_tied_gradient_and_global_clipping(tied_gradient: str, scope: str) -> None:
    mine = dataclasses.replace(
        case("prediction adamw", "ragged, padded"), tied_gradient=tied_gradient, scope=scope, clip=0.3
    )
    assert_same_run(Run(mine, "reference").train(), Run(mine, "lockstep").train())


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS) if EVERY else list(KINDS)[::2])
def test_a_resumed_run_equals_itself(kind: str) -> None:
    """Written by one schedule, taken up by another, in the warm-up and after it."""
    mine = case(kind, "warm-up, one tick" if "gap" in kind or "feedback" in kind else "warm-up, two ticks")
    total = len(mine.updates)
    whole = Run(mine, "reference").train()
    for stop, writer, reader in ((1, "pipelined", "reference"), (4, "reference", "pipelined")):
        first = Run(mine, writer)
        try:
            for u in range(stop):
                first.update(u)
            checkpoint = first.checkpoint()
        finally:
            first.engine.close()
        second = Run(mine, reader).resume(checkpoint).train(updates=range(stop, total))
        assert differences(whole.model.state_dict(), second.model.state_dict()) == []
        assert differences(whole.optimizer.state_dict(), second.optimizer.state_dict()) == []
        assert whole.losses[-len(second.losses) :] == second.losses


def test_evaluation_looks_at_real_weights() -> None:
    """Between ticks the model's parameters are those of the reference, whatever the forwards use."""
    mine = case("prediction adamw", "tied")
    seen = []
    for schedule in ("reference", "pipelined"):
        run = Run(mine, schedule)
        weights = []
        try:
            for u in range(5):
                run.update(u)
                run.engine.submit(run.case.batches(u)[0], 10)
                run.engine.synchronize()
                weights.append({n: p.detach().clone() for n, p in run.model.named_parameters()})
                run.engine.step()
        finally:
            run.engine.close()
        seen.append(weights)
    assert differences(*seen) == []
