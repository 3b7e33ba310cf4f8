"""Everything in this folder needs an accelerator, and is marked and skipped as such."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_runs import COUNT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not COUNT:
                item.add_marker(pytest.mark.skip(reason="needs an accelerator (a GPU that torch knows); there is none"))


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that sum in one order always, so that two runs can be compared."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
