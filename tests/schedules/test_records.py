"""A schedule is one record: who adds one has it in options, runs, plans, simulations, pictures and cards."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from helpers import Case, Run, assert_same_run, tiny_gpt2

import hf_ouroboros
from hf_ouroboros import OuroborosArguments, UnsupportedOptionError
from hf_ouroboros.cli import main
from hf_ouroboros.hub.card import CardFacts, build_card
from hf_ouroboros.schedules import DEFAULT, SCHEDULES, Schedule, schedule_named
from hf_ouroboros.schedules.instructions import Backward, InputGradient, WeightGradient
from hf_ouroboros.schedules.interleave import lockstep_programs, sample_slots
from hf_ouroboros.schedules.records import device_programs


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Schedule:
    """Devices in step, all gradients exact."""
    record = Schedule(
        "toy",
        "all together, exact",
        "#123456",
        lockstep_programs,
        is_synchronous=True,
        allows_global_norm=False,
        in_flight=lambda stage, num_stages, micro_batches: min(micro_batches, num_stages - stage),
    )
    monkeypatch.setitem(SCHEDULES, "toy", record)
    return record


def test_a_toy_schedule_runs_and_is_exact(toy: Schedule) -> None:
    case = Case(3, updates=(2, 4, 1), tied=False, dropout=0.1)
    assert_same_run(Run(case, "1f1b").train(), Run(case, "toy").train())


def test_a_toy_schedule_is_an_option(toy: Schedule, tmp_path: Path) -> None:
    assert OuroborosArguments(output_dir=str(tmp_path), schedule="toy").schedule == "toy"
    for refused in ({"clip_scope": "global"}, {"tied_gradient": "paper"}):
        with pytest.raises(UnsupportedOptionError, match="schedule='toy'"):
            OuroborosArguments(output_dir=str(tmp_path), schedule="toy", **refused)


def test_compiled_backwards_are_not_divided(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="torch_compile=True makes backwards .* use schedule='1f1b'"):
        OuroborosArguments(output_dir=str(tmp_path), schedule="zero_bubble", torch_compile=True)


def test_a_toy_schedule_is_planned_simulated_and_described(
    toy: Schedule, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tiny_gpt2().config.save_pretrained(tmp_path / "model")
    shape = ["--batch", "2", "--seq", "8", "--micro_batches", "4"]
    output = ["--output", str(tmp_path / "plan")]
    assert main(["plan", str(tmp_path / "model"), "--devices", "2xt4", *shape, "--schedule", "toy", *output]) == 0
    text = capsys.readouterr().out
    assert "no gradient is late" in text and re.search(r"^ *toy ", text, re.MULTILINE)
    output = ["--output", str(tmp_path / "curves.png")]
    assert main(["simulate", str(tmp_path / "model"), *shape, "--counts", "2", "--schedules", "toy", *output]) == 0
    assert re.search(r"^ *toy ", capsys.readouterr().out, re.MULTILINE)
    facts = CardFacts(
        model_name="m", model_type="gpt2", num_parameters=1, schedule="toy", num_stages=2, micro_batches_per_update=1
    )
    text = build_card(facts).text
    assert "ordinary synchronous training" in text and "`toy` (all together, exact)" in text


def test_names_are_compared_nowhere_else() -> None:
    """Only texts for users name schedules."""
    package = Path(hf_ouroboros.__file__).parent
    name = "|".join(map(re.escape, SCHEDULES))
    compared = re.compile(rf"(==|!=|\bin|\bcase) *[(\[{{]?[\"']({name})[\"']")
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if compared.search(line)
    ]
    assert found == []


def test_the_default_is_the_first() -> None:
    assert DEFAULT == OuroborosArguments.schedule == "pipelined"
    with pytest.raises(ValueError, match="schedule 'fast' is unknown; use one of pipelined, lockstep"):
        schedule_named("fast")


def most_waiting(schedule: str, placement: list[int], costs: list[float], micro_batches: int) -> int:
    """Most output-side gradients that wait for the first stage, in the order of the device that has it and the last one."""
    last, record = len(placement) - 1, SCHEDULES[schedule]
    programs = device_programs(schedule, placement, costs, [2 * cost for cost in costs], micro_batches)
    waiting = most = 0
    for instruction in programs[placement[0]](sample_slots(last + 1, micro_batches, record.is_synchronous)):
        match instruction:
            case WeightGradient(stage) if stage == last:
                waiting += 1
            case InputGradient():
                pass
            case Backward(stage) if stage in (0, last):
                waiting += 1 if stage else -1
        most = max(most, waiting)
    assert waiting == 0 or not record.is_synchronous
    return most


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
@pytest.mark.parametrize("stages", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("schedule", ["pipelined", "lockstep", "1f1b", "zero_bubble"])
def test_output_sides_wait_as_the_record_says(schedule: str, stages: int, micro_batches: int) -> None:
    """Whatever the stages cost, and with other stages beside the first and the last one."""
    generator, said = random.Random(0), SCHEDULES[schedule].output_sides(stages, micro_batches)
    for devices in {stages - 1, max(1, stages // 2)}:
        placement = [k % devices for k in range(stages - 1)] + [0]
        for costs in ([1.0] * stages, [generator.choice((0.2, 0.5, 1.0, 3.0)) for _ in range(stages)]):
            found = most_waiting(schedule, placement, costs, micro_batches)
            assert found == said if schedule in ("pipelined", "lockstep") else 1 <= found <= said
