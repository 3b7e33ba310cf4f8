"""The recipes' own modules, importable; and one tiny pretrained model for all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "recipes")]

from running import TINY, recipe  # noqa: E402


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a tiny run of pretrain_lm.py, and what the run printed."""
    folder = tmp_path_factory.mktemp("pretrained")
    done = recipe("pretrain_lm.py", folder, TINY | {"output_dir": "out", "eval_strategy": "steps", "eval_steps": 2})
    return folder / "out", done.stdout
