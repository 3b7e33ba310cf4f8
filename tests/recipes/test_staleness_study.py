"""The staleness study: grids, results that are kept, and the arithmetic of its report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from common import OptionError
from running import RECIPES, run
from staleness_report import Interval, costs, rows_of, token_ratio, tokens_to_reach, write_report
from staleness_setting import Setting, StudyArguments, read_grid
from staleness_study import Examples, missing_runs, read_text

TINY = {"updates": 4, "warmup_updates": 1, "layers": 3, "width": 16, "heads": 2, "rows": 2, "block_size": 16}


def grid(folder: Path, content: Any) -> str:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return str(path)


def result(stages: int, test: float | None, **setting: Any) -> dict[str, Any]:
    """What a run leaves, as far as the report reads it."""
    values = vars(Setting(stages=stages, **setting))
    return {"setting": dict(values), "data": "text", "tokens_per_update": 1024, "validation": test, "test": test}


def test_grid_is_all_combinations_over_defaults(tmp_path: Path) -> None:
    runs = [{"stages": [1, 3], "learning_rate": ["1e-3", 0.01]}, {"stages": 5, "seed": [0, 1, 2]}]
    settings = list(read_grid(grid(tmp_path, {"defaults": {"width": 64}, "runs": runs})))
    assert len(settings) == 7 and {s.width for s in settings} == {64}
    assert [(s.stages, s.learning_rate) for s in settings[:4]] == [(1, 1e-3), (1, 0.01), (3, 1e-3), (3, 0.01)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"runs": [{"stage": 3}]}, "'stage' is no field of a run; there are stages, micro_batches"),
        ({"runs": [{"stages": "three"}]}, "invalid literal"),
        ({"runs": [{"micro_batches": 5}]}, "micro_batches=5 does not divide rows=16"),
        ({"runs": [{"model": "lama"}]}, "model='lama' is unknown to Transformers; use gpt2, llama"),
        ({"runs": [{"model": "transfo-xl", "lora_rank": 4}]}, "adapters are studied on decoders"),
        ({"run": []}, "no YAML file with a list 'runs'"),
        ([], "no YAML file with a list 'runs'"),
    ],
)
def test_grids_that_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        list(read_grid(grid(tmp_path, content)))


@pytest.mark.parametrize(
    "name",
    [
        "screen",
        "confirm",
        "one_tick",
        "micro_batches",
        "finetune",
        "finetune_shakespeare",
        "finetune_shakespeare_adamw",
        "finetune_epoch",
        "transfo_xl",
        "llama",
        "lora",
        "smoke",
    ],
)
def test_grids_of_the_repository(name: str) -> None:
    settings = list(read_grid(str(RECIPES / "staleness_grids" / f"{name}.yaml")))
    assert settings and len({s.name("text") for s in settings}) == len(settings)
    assert {s.stages for s in settings} > {1}, "a synchronous run to compare with"


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    path = grid(tmp_path, {"runs": [{"seed": [0, 1]}]})
    options = StudyArguments(grid=[path], output_dir=str(tmp_path))
    first, second = missing_runs(options)
    first.write_text("{}")
    assert list(missing_runs(options)) == [second]
    other = StudyArguments(grid=[path], output_dir=str(tmp_path), train_file="other.txt")
    assert len(missing_runs(other)) == 2


def test_text_is_split_and_cut_into_blocks_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(200)))
    train, validation, test = read_text(str(tmp_path / "text"))
    assert (train, validation, test) == (bytes(range(180)), bytes(range(180, 190)), bytes(range(190, 200)))
    found = Examples(Setting(block_size=8)).held_out(train, 20)
    assert len(found) == 2 and found[1]["input_ids"].tolist() == list(range(8, 16))


def test_a_model_with_memory_reads_columns() -> None:
    examples = Examples(Setting(model="transfo-xl", block_size=8, rows=4, updates=5))
    found = examples.train(bytes(range(200)))
    assert found[1].input_ids.tolist() == list(range(48, 56)) and (found[1].column, found[5].segment) == (1, 1)
    assert examples.held_out(bytes(range(200)), 150).num_targets == 149
    with pytest.raises(OptionError, match="updates=5 is more than the 3 segments of a column"):
        examples.train(bytes(100))


def test_names_say_only_what_is_special() -> None:
    """A field that is added later changes no name of a run that is there."""
    assert Setting(width=128).name("text") == Setting().name("text") != Setting(width=64).name("text")


def test_interval_is_students() -> None:
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2 and interval.half == pytest.approx(4.303 / math.sqrt(3))
    assert Interval.of([5.0]).text(".1f", " %") == "5.0 %"
    assert interval.text(".1f") == "2.0 ± 2.5"
    assert Interval.of([1.0, math.inf]).text() == "diverged"


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ({1000: 3.0}, (1.0, "")),
        ({1000: 2.9}, (1.0, "<")),
        ({1000: 3.1}, (1.0, ">")),
        ({1000: 3.1, 2000: 3.05}, (2.0, ">")),
        ({1000: 3.1, 4000: 2.9}, (2.0, "")),  # half of the way, in the logarithm of the length
        ({500: 3.2, 1000: 3.0}, (1.0, "")),
        ({1000: math.inf, 2000: 2.0}, (2.0, "")),
    ],
)
def test_tokens_to_reach(lengths: dict[int, float], expected: tuple[float, str]) -> None:
    ratio, bound = tokens_to_reach(lengths, 3.0, 1000)
    assert (ratio, bound) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        ({1000: 2.9}, (1 / 0.75, "")),  # a synchronous run of 750 updates would have ended there
        ({1000: 3.1}, (2.0, ">")),  # not even one of 500
        ({1000: 2.7}, (1.0, "<")),
        ({1000: 2.9, 1500: 2.7}, (1.0 * math.sqrt(1.5), "")),  # runs of its own come first
    ],
)
def test_token_ratio_of_the_same_loss(late: dict[int, float], expected: tuple[float, str]) -> None:
    runs = [result(1, loss, updates=u) for u, loss in {500: 3.0, 750: 2.9, 1000: 2.8}.items()]
    synchronous, row = rows_of([*runs, *(result(3, loss, updates=u) for u, loss in late.items())])
    ratio, bound = token_ratio(row, synchronous, 1000, 0)
    assert (ratio, bound) == (pytest.approx(expected[0]), expected[1])


def test_learning_rate_is_the_best_on_common_seeds() -> None:
    """1e-2 is better on its only seed, but not on the seed that both have."""
    runs = [result(1, 3.0, seed=0), result(1, 2.0, seed=1), result(1, 2.9, seed=1, learning_rate=1e-2)]
    runs += [result(1, None, seed=0, learning_rate=1e-1), result(1, None, seed=1, learning_rate=1e-1)]
    (row,) = rows_of(runs)
    assert row.rates == {1000: "0.001 (edge)"} and row.test == {1000: {0: 3.0, 1: 2.0}}
    (row,) = rows_of([*runs, result(1, 4.0, seed=1, learning_rate=1e-4)])
    assert row.rates == {1000: "0.001"}


def test_costs_are_paired_by_seed() -> None:
    runs = [result(1, 3.0, seed=0), result(1, 2.0, seed=1), result(3, 3.3, seed=0), result(3, 2.2, seed=1)]
    synchronous, late = rows_of(runs)
    cost = costs(late, synchronous, 1000)
    assert cost.mean == pytest.approx(10) and cost.half == pytest.approx(0, abs=1e-9)


def test_report_compares_with_the_same_optimizer_and_with_adamw(tmp_path: Path) -> None:
    runs = [result(1, 3.0), result(1, 2.5, compensation="muon"), result(3, 2.75, compensation="muon+lr_rescale")]
    runs += [result(3, 2.45, compensation="muon+lr_rescale", updates=2000), result(3, None)]
    for i, found in enumerate(runs):
        (tmp_path / f"K{i}.json").write_text(json.dumps(found))
    text = write_report(tmp_path)
    assert (tmp_path / "report.md").read_text().startswith(text)
    assert (tmp_path / "cost-1.png").stat().st_size > 10_000
    line = next(line for line in text.splitlines() if "lr_rescale" in line)
    ratio = math.exp(math.log(2) * 0.25 / 0.3)
    assert line.split(" | ")[5:9] == ["2.750", "+10.0 %", "-8.3 %", f"{ratio:.2f}"]
    assert "diverged" in text


def test_report_is_about_the_length_of_most_runs(tmp_path: Path) -> None:
    """Shorter synchronous runs only tell how many tokens a loss is worth."""
    for i, found in enumerate(
        [result(1, 3.0, updates=500), result(1, 2.5, updates=1000), result(3, 2.75, updates=1000)]
    ):
        (tmp_path / f"K{i}.json").write_text(json.dumps(found))
    text = write_report(tmp_path)
    assert "1000 updates of" in text and "+10.0 %" in text and f"{math.sqrt(2):.2f}" in text


@pytest.mark.slow
def test_a_study_from_end_to_end(tmp_path: Path) -> None:
    """A run that fails is named and leaves the others alone; what is there is reported."""
    runs = [{"stages": [1, 3], "seed": [0]}, {"stages": 9}, {"stages": 3, "model": "transfo-xl", "micro_batches": 2}]
    runs.append({"stages": 2, "model": "llama", "lora_rank": 2})
    command = [str(RECIPES / "staleness_study.py"), "--grid", grid(tmp_path, {"defaults": TINY, "runs": runs})]
    command += ["--eval_tokens=256", "--test_tokens=256", "--eval_updates=2", "--output_dir=out", "--report"]
    done = run(command, tmp_path, fails=True)
    assert "5 runs to do" in done.stdout and "FAILED: DeviceMapError" in done.stdout, done.stdout
    assert "| none | 3 | 1 |" in done.stdout
    files = sorted((tmp_path / "out").glob("*.json"))
    assert len(files) == 4
    found = json.loads(files[0].read_text())
    assert [step for step, _ in found["curve"]] == [2, 4]
    assert 5 < found["test"] < 9 and found["curve"][-1][1] == found["validation"]
