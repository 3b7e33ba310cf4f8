"""Names, options and combinations of delay compensations."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_ouroboros.errors import UnsupportedOptionError
from hf_ouroboros.optim import choose
from hf_ouroboros.optim.advice import (
    COSTLY,
    MEASURED,
    MUON_LATE_BY_PARTS,
    MUON_LATE_BY_UPDATES,
    WHOLE_UPDATES,
    automatic,
    recommended_micro_batches,
    warning,
    with_muon,
)
from hf_ouroboros.optim.choice import COMPENSATIONS, NAMES, OPTIMIZERS
from hf_ouroboros.optim.muon import Muon


def test_nothing() -> None:
    choice = choose("none")
    assert (choice.optimizer, choice.compensations, str(choice)) == (None, (), "none")


@pytest.mark.parametrize("name", NAMES)
def test_each_alone(name: str) -> None:
    choice = choose(name)
    assert str(choice) == name
    assert (choice.optimizer is not None) == (name in OPTIMIZERS)
    assert len(choice.compensations) == (name in COMPENSATIONS)


def test_order_of_names_is_of_no_matter() -> None:
    assert choose("lr_rescale + muon") == choose(["muon", "lr_rescale"])
    assert str(choose("lr_rescale+gap_aware+nesterov")) == "nesterov+gap_aware+lr_rescale"


def test_options_reach_their_owner_with_their_type() -> None:
    choice = choose("muon+weight_prediction+lr_rescale", "momentum=0.9, adjust_lr_fn=original,anneal=7,horizon=.5")
    assert (choice.optimizer.momentum, choice.optimizer.adjust_lr_fn) == (0.9, "original")
    assert (choice.compensations[0].horizon, choice.compensations[1].anneal) == (0.5, 7)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "nesterov+magic",
            None,
            "'magic' is unknown; use none, auto, muon\\+auto, or one or several of nesterov, muon",
        ),
        ("auto+muon", None, r"auto stands alone, or behind muon as muon\+auto"),
        ("auto+lr_rescale", None, "auto stands alone"),
        ("muon+none", None, "'none' is unknown"),
        ("", None, "'' is unknown"),
        ("muon+muon", None, "names 'muon' twice"),
        ("nesterov+muon", None, "nesterov and muon don't go together: each of them is an optimizer"),
        ("nesterov+weight_prediction", None, "nesterov and weight_prediction don't go together: both look ahead"),
        ("nesterov+error_feedback", None, "don't go together: both extrapolate"),
        ("gap_aware+weight_prediction", None, "don't go together: the gap would be measured from"),
        ("gap_aware+error_feedback+muon", None, "don't go together: one adds"),
        ("none", "anneal=3", "'anneal=3' is no option of delay_compensation='none'; its options are none at all"),
        ("lr_rescale", "momentum=3", "its options are anneal=..., rescaled=..."),
        ("lr_rescale", "anneal", "anneal='' must be a whole number"),
        ("lr_rescale", "anneal=0.5", "anneal='0.5' must be a whole number"),
        ("lr_rescale", "anneal=-1", "anneal='-1' must be a whole number from 0 to"),
        ("lr_rescale", "rescaled=some", "rescaled='some' is unknown; use one of all, adamw"),
        ("muon+basis_rotation", None, "muon and basis_rotation don't go together"),
        ("basis_rotation", "refresh=0", "refresh='0' must be a whole number from 1 to"),
        ("weight_prediction", "prediction=magic", "prediction='magic' is unknown; use one of momentum, step"),
        *(
            (name, f"{option}={value}", f"{option}='{value}' must be a number")
            for name, option, values in (
                ("muon", "momentum", ("-1", "1", "inf", "nan", "")),
                ("nesterov", "beta1", ("-0.1", "1", "nan")),
                ("nesterov", "momentum_decay", ("-1", "inf")),
                ("basis_rotation", "covariance_decay", ("2", "nan")),
                ("weight_prediction", "horizon", ("-1", "inf")),
                ("error_feedback", "feedback", ("-1", "nan")),
                ("gap_aware", "gap_decay", ("1", "nan")),
                ("gap_aware", "gap_eps", ("0", "-1", "inf")),
            )
            for value in values
        ),
        ("lr_rescale", "anneal=1,anneal=2", "anneal is given twice"),
        ("muon", "momentum=much", "momentum='much' must be a number"),
        ("muon", "adjust_lr_fn=magic", "adjust_lr_fn='magic' is unknown; use one of match_rms_adamw, original"),
    ],
)
def test_refused(text: str, options: str | None, message: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=message):
        choose(text, options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adagrad(p), "not Adagrad"),
        (lambda p: torch.optim.NAdam(p), "not NAdam"),
        (
            lambda p: torch.optim.SGD(p, lr=0.1),
            "SGD has none here; set optim_args='momentum=0.9' or delay_compensation_args='prediction=step'",
        ),
        (lambda p: torch.optim.AdamW(p, maximize=True), "maximize=True"),
    ],
)
def test_weight_prediction_needs_a_momentum_that_it_knows(make: object, message: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=message):
        choose("weight_prediction").check(make([torch.nn.Parameter(torch.zeros(1))]))
    choose("weight_prediction", "prediction=step").check(make([torch.nn.Parameter(torch.zeros(1))]))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("none", ""),
        ("muon+weight_prediction", ""),
        ("muon+weight_prediction+lr_rescale", "momentum=0.9,adjust_lr_fn=original,horizon=0.5,anneal=7"),
        WHOLE_UPDATES,
        MUON_LATE_BY_PARTS,
        MUON_LATE_BY_UPDATES,
    ],
)
def test_options_make_the_same_choice(text: str, options: str) -> None:
    choice = choose(text, options)
    assert choice.options == options and choose(str(choice), choice.options) == choice


# ---- advice ----


def test_auto_keeps_the_optimizer_while_delays_are_short() -> None:
    assert automatic(1, 1, "adamw") == automatic(3, 1, "another") == ("none", None)
    shares = [(2, 2), (3, 3), (3, 4), (9, 16)]
    assert [automatic(k, m, "adamw") for k, m in shares] == [("weight_prediction", None)] * 4
    assert choose(*automatic(3, 4, "adamw")).optimizer is None


def test_auto_takes_muon_with_adamws_steps_for_whole_updates() -> None:
    whole = [choose(*automatic(k, m, "adamw")) for k, m in [(2, 1), (3, 2), (5, 4), (9, 1)]]
    assert set(whole) == {choose("muon+weight_prediction+lr_rescale", WHOLE_UPDATES[1])}
    assert whole[0].optimizer.adjust_lr_fn == "measure_rms_adamw"
    rescale = whole[0].compensations[-1]
    assert (rescale.anneal, rescale.rescaled) == (0, "adamw")


def test_muon_auto_goes_by_the_delay() -> None:
    assert with_muon(1, 1) == ("muon", None)
    assert {with_muon(k, m) for k, m in [(2, 2), (3, 4), (9, 16)]} == {MUON_LATE_BY_PARTS}
    assert {with_muon(k, m) for k, m in [(2, 1), (3, 2), (9, 1)]} == {MUON_LATE_BY_UPDATES}
    for k, m in [(1, 1), (3, 4), (3, 1)]:
        assert choose(*with_muon(k, m)).optimizer == choose("muon").optimizer


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16)])
def test_recommended_micro_batches(stages: int, micro_batches: int) -> None:
    assert recommended_micro_batches(stages) == micro_batches
    assert warning(stages, micro_batches, 1e-2, "muon", "error_feedback") is None
    assert warning(stages, micro_batches, 1e-2, "adamw", "error_feedback") is None


def test_warning_has_a_measured_number_and_what_to_do() -> None:
    text = warning(5, 1, 1e-2, "adamw")
    assert "up to 4 update(s) late" in text and "cost 38.2 %" in text and "(K=5, M=1," in text
    assert (
        "set gradient_accumulation_steps to 8" in text and "set delay_compensation to 'auto', which takes Muon" in text
    )
    text = warning(3, 4, 1e-2, "adamw")
    assert "'muon+auto', or to 'auto', which keeps the optimizer" in text
    assert "cost 5.9 %" in text and "gradient_accumulation_steps to" not in text
    assert "cost 10.1 %" in warning(3, 1, 1e-2, "muon", "error_feedback")
    assert "'muon+auto'" in warning(3, 1, 1e-2, "muon", "error_feedback")
    assert warning(3, 1, 1e-2, "muon", "weight_prediction+error_feedback+lr_rescale") is None
    assert "cost 13.9 %" in warning(5, 1, 1e-3, "muon", "weight_prediction+lr_rescale")
    assert warning(5, 1, 3e-4, "muon", "weight_prediction+lr_rescale") is None
    assert "'muon+auto'" in warning(9, 1, 1e-2, "muon") and "nesterov" in warning(9, 2, 1e-2, "nesterov")


def test_warning_of_adapters_is_of_adapters() -> None:
    text = warning(5, 1, 1e-2, "adamw", adapters=True)
    assert "cost 13.1 % in bits per byte (K=5, M=1, learning rate 0.003, LoRA on a small model)" in text
    assert "set gradient_accumulation_steps to 8" in text and "to 'auto', which adds weight prediction" in text
    assert "cost 10.5 %" in warning(5, 1, 1e-2, "adamw", "weight_prediction", adapters=True)
    for stages, micro_batches in [(3, 4), (5, 8), (5, 4)]:
        assert warning(stages, micro_batches, 1e-2, "adamw", adapters=True) is None
    assert warning(5, 1, 2e-4, "adamw", adapters=True) is None  # of such rates nothing is known


def test_no_warning_without_knowledge_or_cost() -> None:
    assert warning(1, 1, 1e-2, "adamw") is None
    assert warning(3, 16, 1e-2, "adamw") is None
    assert warning(5, 1, 3e-4, "adamw") is None and warning(5, 1, 4e-4, "adamw") is not None
    assert warning(9, 1, 1e-2, "Adafactor") is None
    assert warning(9, 1, 1e-2, "adamw", "gap_aware") is None
    assert all(m.cost > 0 for m in MEASURED) and any(m.cost < COSTLY for m in MEASURED)
    assert len({(m.optimizer, m.compensation, m.stages, m.micro_batches, m.adapters) for m in MEASURED}) == len(
        MEASURED
    )


def test_options_are_read_however_a_compensation_is_made() -> None:
    assert Muon("0.5") == Muon(0.5) == choose("muon", "momentum=0.5").optimizer
    for value in (True, None, [0.9], float("inf"), -1):
        with pytest.raises(UnsupportedOptionError, match="delay_compensation_args: momentum="):
            Muon(value)


def test_every_option_of_every_compensation_has_a_rule() -> None:
    kinds = [*OPTIMIZERS.values(), *COMPENSATIONS.values()]
    own = [(kind, field) for kind in kinds for field in dataclasses.fields(kind)]
    assert len(own) == len({field.name for _, field in own}), "an option of two compensations would reach one of them"
    for kind, field in own:
        with pytest.raises(UnsupportedOptionError, match=f"{field.name}={{}} "):
            kind(**{field.name: {}})
