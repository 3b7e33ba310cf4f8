"""benchmark_memory.py: how its cases are written, and a small run end to end, which the planner has to foretell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_memory import MIB, Case, MemoryBenchmarkArguments, table, table_of_parameters
from running import RECIPES, run

from hf_ouroboros.memory_use import peak_memory


def test_cases_are_read() -> None:
    case = Case.parse("llama:8,384,2,128:4:1:float32:8")
    assert case == Case("llama", (8, 384, 2, 128), 4, 1, "float32", 8)
    assert str(case) == "llama 8, 384, 2, 128; float32, LoRA of rank 8"
    assert Case.parse("gpt2:8,256,4,256:2:4") == Case("gpt2", (8, 256, 4, 256), 2, 4)
    for text in MemoryBenchmarkArguments().cases:
        Case.parse(text)


@pytest.mark.parametrize(
    "text", ["gpt2", "gpt2:8,256,4:2:4", "gpt2:8,256,4,256:2:4:fp16", "gpt2:8,2,4,2:2:4:float32:8:9"]
)
def test_what_is_no_case(text: str) -> None:
    with pytest.raises(SystemExit, match="--cases .* is not MODEL:"):
        Case.parse(text)


def test_tables() -> None:
    part = {"weights": 4.0 * MIB, "activations": 2.0 * MIB, "working": 1.0 * MIB, "messages": 0.0}
    found = {
        "case": "gpt2 1, 2, 3, 4; float32",
        "K": 3,
        "M": 4,
        "planned": [7.0 * MIB, 11.0 * MIB],
        "training": [8 * MIB, 10 * MIB],
        "parameters": [MIB, MIB],
        "parts": [[part], [part]],
    }
    assert table([found]).splitlines()[-1] == "| gpt2 1, 2, 3, 4; float32 | 3 | 4 | 7, 11 | 8, 10 | 0.88, 1.10 |"
    assert (
        table_of_parameters([found]).splitlines()[-1] == "| gpt2 1, 2, 3, 4; float32 | 3 | 4 | 4.0 | 3.0 | 8.0 | 5.0 |"
    )


@pytest.mark.slow
def test_the_peak_of_processes_is_foretold(tmp_path: Path) -> None:
    if peak_memory().resident is None:
        pytest.skip("the current size is known on Linux only")
    cases = ["gpt2:6,192,4,96:2:2", "llama:6,192,4,64:3:2:float32:4"]
    run([str(RECIPES / "benchmark_memory.py"), "--cases", *cases, "--output_dir", "out"], tmp_path)
    for found in json.loads((tmp_path / "out" / "results.json").read_text())["results"]:
        assert len(found["planned"]) == len(found["training"]) > 1
        for planned, grown in zip(found["planned"], found["training"], strict=True):
            # Allocators, and pages of libraries that a tiny run did not touch: 2 MiB of some 50.
            assert planned == pytest.approx(grown, rel=0.1, abs=2 * MIB), found
