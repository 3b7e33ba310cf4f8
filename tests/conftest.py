"""Settings of all tests: no network, no telemetry, no progress bars, one thread per kernel."""

from __future__ import annotations

import gc
import os
from collections import Counter
from types import SimpleNamespace

# Read by the libraries when they are imported, so they have to be set before.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The models are tiny: more threads per kernel would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# At every seed torch keeps, for accelerators that are not started, the stack with its lines of source: a deep one in tests.
torch.cuda.traceback = SimpleNamespace(format_stack=list)

# The same examples in every run: a test that turns red was turned red by a change. Others are found with
# pytest --hypothesis-profile=search
settings.register_profile("search", settings.default, derandomize=False, deadline=None)
settings.register_profile("repeatable", settings.default, derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a sweep over combinations, `sampled(n)`, every n-th is run, or all with HF_OUROBOROS_EVERY_CASE=1."""
    if os.environ.get("HF_OUROBOROS_EVERY_CASE"):
        return
    seen: Counter[str] = Counter()
    left_out = []
    for item in items:
        if (mark := item.get_closest_marker("sampled")) is not None:
            sweep = item.nodeid.partition("[")[0]
            if seen[sweep] % mark.args[0]:
                left_out.append(item)
            seen[sweep] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_collection_finish() -> None:
    """Takes what imports have made out of garbage collection: accelerate collects after every `train()`."""
    gc.collect()
    gc.freeze()
