"""What processes must agree on: named where it differs, silent where it may; pure, and over two processes."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from disagreeing_runs import ALL, ALONG, GIVEN, OPTIONS, disagreeing, words
from rig import in_processes
from trainer_helpers import common_options, run_python

from hf_ouroboros import OuroborosArguments
from hf_ouroboros.processes import run_digest
from hf_ouroboros.processes.handshake import (
    MAY_DIFFER,
    SHOWN,
    WHETHER,
    Difference,
    checksum,
    differences,
    disagreement,
    options_to_compare,
)

WITHIN = 20.0  # seconds, half of ddp_timeout: nobody waited for that. Measured on a quiet machine: below one


def arguments(folder: Path, **options: Any) -> OuroborosArguments:
    return OuroborosArguments(**common_options(folder, **options))


# ---- the comparison ----


def test_equal_facts_agree() -> None:
    one = {"options": {"a": 1, "b": [1, 2]}}
    assert disagreement("here", {0: one, 1: {"options": {"b": [1, 2], "a": 1}}}) is None
    assert checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1}) != checksum({"a": 1, "b": 3})


def test_says_which_rank_which_option_and_all_values() -> None:
    tables = {rank: {"options": {"lr": 0.5 if rank == 2 else 0.1, "seed": 0}} for rank in range(4)}
    error = disagreement("train()", tables)
    assert error.names == ("lr",)
    assert "disagree, at train(): lr is 0.5 on rank 2, 0.1 on ranks 0, 1, 3. Start all" in str(error)


def test_what_only_some_have() -> None:
    assert differences({0: {"options": {"a": 1}}, 1: {}}) == [Difference("a", {0: 1, 1: "(nothing)"})]


def test_weights_are_compared_among_those_who_hold_them() -> None:
    tables = {0: {"weights": {"a": "x", "b": None}}, 1: {"weights": {"a": None, "b": "y"}}}
    assert disagreement("here", tables) is None
    tables[2] = {"weights": {"a": "z", "b": "y"}}
    assert differences(tables) == [Difference("a", {0: "x", 2: "z"})]


def test_what_follows_from_another_difference_is_left_out() -> None:
    here = {"point": {"point": "evaluate"}, "options": {"a": 1}, "weights": {"w": "x"}}
    error = disagreement("here", {0: here, 1: {**here, "options": {"a": 2}, "weights": {"w": "y"}}})
    assert error.names == ("a",)
    error = disagreement("here", {0: here, 1: {**here, "point": {"point": "save"}, "options": {}}})
    assert error.names == ("point",)


def test_long_values_and_many_differences_are_shortened() -> None:
    long = {f"name {i}": i for i in range(1000)}
    text = str(Difference("table", {0: long, 1: {**long, "name 700": 0}}))
    assert '"name 700": 700' in text and '"name 700": 0' in text and len(text) < 300
    many = {rank: {"options": {str(i): rank for i in range(SHOWN + 3)}} for rank in range(2)}
    assert "; and 3 more. " in str(disagreement("here", many))


# ---- the facts ----


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_compared(tmp_path: Path, name: str) -> None:
    found = [
        run_digest.options(arguments(tmp_path, **ALONG.get(name, {}) | changed))
        for changed in ({}, {name: OPTIONS[name]})
    ]
    assert name in {d.name for d in differences(dict(enumerate({"options": table} for table in found)))}
    json.dumps(found, allow_nan=False)


def test_all_options_are_known() -> None:
    """An option is compared, refused, or excused with a reason; a new one of Trainer's is compared."""
    fields = {field.name for field in dataclasses.fields(OuroborosArguments)}
    compared = options_to_compare(dict.fromkeys(fields))
    assert compared.keys() == fields - MAY_DIFFER.keys()
    assert OPTIONS.keys() <= compared.keys() and WHETHER.keys() <= compared.keys()
    assert all(reason for reason in [*MAY_DIFFER.values(), *WHETHER.values()])


def test_what_may_differ_does_not_matter(tmp_path: Path) -> None:
    given = {"output_dir": "elsewhere", "disable_tqdm": False, "run_name": "other", "hub_token": "secret"}
    given |= {"log_level": "error", "dataloader_prefetch_factor": None, "skip_memory_metrics": False}
    tables = [run_digest.options(OuroborosArguments(**common_options("x", timeline="a"))), {}]
    tables[1] = run_digest.options(OuroborosArguments(**common_options("x", timeline="b") | given))
    assert differences(dict(enumerate({"options": table} for table in tables))) == []
    assert "secret" not in json.dumps(tables)


def test_options_of_a_scripts_own_do_not_matter(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Own(OuroborosArguments):
        cache: str = ""

    found = run_digest.options(Own(**common_options(tmp_path), cache="/scratch"))
    assert "cache" not in found and "learning_rate" in found


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_script_gives_is_plain(name: str) -> None:
    """Facts of the same thing, made twice, are equal: no addresses, no sets in another order."""
    model = GIVEN[name][2]().get("model")
    if model is not None:
        again = GIVEN[name][2]()["model"]
        assert run_digest.model(model) == run_digest.model(again) and run_digest.weights(model) == run_digest.weights(
            again
        )
        json.dumps(run_digest.model(model), allow_nan=False)


# ---- over processes ----


def named_by_all(tmp_path: Path, world: int, odd: int, cases: list[tuple[str, str]]) -> None:
    outcomes = in_processes(world, disagreeing, str(tmp_path), cases, odd, limit=240)
    for case, ends in zip(cases, zip(*outcomes, strict=True), strict=True):
        kinds, texts, seconds = zip(*ends, strict=True)
        assert set(kinds) == {"DisagreementError"}, (case, ends)
        assert words(*case) in texts[0] and len(set(texts)) == 1, (case, ends)
        assert f"on rank {odd}" in texts[0] and max(seconds) < WITHIN, (case, ends)


@pytest.mark.slow
def test_every_difference_is_named_by_all(tmp_path: Path) -> None:
    """All options and all that a script may give: about 15 s on two quiet cores."""
    named_by_all(tmp_path, 2, 1, ALL)


@pytest.mark.slow
def test_the_main_process_is_the_odd_one_of_three(tmp_path: Path) -> None:
    cases = [("option", n) for n in ("schedule", "num_stages", "device_map", "learning_rate")]
    named_by_all(tmp_path, 3, 0, [*cases, ("given", "layers"), ("given", "betas"), ("given", "rows")])


FACTS = """
import json, sys
from trainer_helpers import ouroboros
from hf_ouroboros.processes import run_digest
trainer = ouroboros(sys.argv[1], remove_unused_columns=True)
loader = trainer.get_eval_dataloader()
found = [run_digest.data(loader, loader.dataset, loader.collate_fn), run_digest.model(trainer.model), run_digest.weights(trainer.model)]
print(hash("order"))
print(json.dumps([found, run_digest.plan(trainer.stage_plan.rows)], default=str))
"""


@pytest.mark.slow
def test_facts_do_not_depend_on_the_order_of_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every process that a launcher starts has an order of its own; those of these tests are forked and share one.

    A Python that is started has another order than this process, which is asserted.
    """
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path)])
    exec(FACTS, {})
    monkeypatch.setenv("PYTHONHASHSEED", "12345" if os.environ.get("PYTHONHASHSEED") else "")
    done = run_python(FACTS, tmp_path)
    assert done.returncode == 0, done.stderr
    (*_, first, found), (*_, second, again) = capsys.readouterr().out.splitlines(), done.stdout.splitlines()
    assert first != second
    assert "collator's signature_columns" in found
    assert json.loads(found) == json.loads(again)
