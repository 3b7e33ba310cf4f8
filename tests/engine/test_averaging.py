"""Gradients over replicas: which share a bucket, and that buckets start while the backward is still running."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import causal_loss, cpu_devices, make_batch, tiny_gpt2

from hf_ouroboros.engine.averaging import BucketedMean
from hf_ouroboros.engine.settings import EngineSettings
from hf_ouroboros.engine.stage_runner import StageRunner
from hf_ouroboros.engine.weights import TiedLink
from hf_ouroboros.partition import split_model

FLOAT = 4


class Doubling:
    """Stands in for the mean over replicas: doubles, when it is waited for, and writes down what happens."""

    def __init__(self, bucket_bytes: int):
        self.bucket_bytes = bucket_bytes
        self.log: list[str] = []

    def start(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        self.log.append(f"start {[t.numel() for t in tensors]}")

        def wait() -> None:
            self.log.append("wait")
            for tensor in tensors:
                tensor.mul_(2)

        return wait


def parameters(**sizes: int) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}


def test_buckets_start_in_a_fixed_order() -> None:
    mean = Doubling(bucket_bytes=10 * FLOAT)
    owned = parameters(first=6, second=3, third=7, large=30, frozen=4)
    owned["frozen"].requires_grad_(False)
    bucketed = BucketedMean(mean, owned)
    window = {name: torch.ones_like(p) for name, p in owned.items() if p.requires_grad}
    for name in ["first", "second", "third"]:  # from the last parameter to the first: large | third, second | first
        bucketed.ready(name, window)
    assert mean.log == []
    bucketed.ready("large", window)
    assert mean.log == ["start [30]", "start [7, 3]", "start [6]"]
    bucketed.rest(window)
    bucketed.wait()
    assert mean.log[3:] == ["wait"] * 3
    assert all(bool((gradient == 2).all()) for gradient in window.values())
    mean.log.clear()
    bucketed.rest({name: window[name] for name in ("first", "third")})  # and again, without some gradients
    bucketed.wait()
    assert mean.log == ["start [7]", "start [6]", "wait", "wait"]


def test_a_bucket_has_one_dtype() -> None:
    mean = Doubling(bucket_bytes=10 * FLOAT)
    owned = parameters(a=2, c=3)
    owned = {"a": owned["a"], "b": torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)), "c": owned["c"]}
    BucketedMean(mean, owned).rest({name: torch.ones_like(p) for name, p in owned.items()})
    assert mean.log == ["start [3]", "start [4]", "start [2]"]


def test_nothing_to_average() -> None:
    mean = Doubling(bucket_bytes=10)
    bucketed = BucketedMean(mean, {})
    bucketed.rest({})
    bucketed.wait()
    assert mean.log == []


@pytest.mark.parametrize("tied", [True, False])
def test_begins_within_the_backward_that_closes_an_update(tied: bool) -> None:
    """Two micro-batches, the second one closing: the window is the doubled sum, most of it started on the way."""
    model = tiny_gpt2(tied).train()
    partition = split_model(model, cpu_devices(2), [2, 2, 1] if tied else [3, 2], check=False)
    stages = range(len(partition.stages))
    windows, started = {}, {}
    for with_replicas in (False, True):
        means = [Doubling(bucket_bytes=500) if with_replicas else None for _ in stages]
        link = TiedLink(partition.tied_names) if tied else None
        runners = [
            StageRunner(partition, k, torch.device("cpu"), causal_loss, EngineSettings(), link, means[k])
            for k in stages
        ]
        for tick in (0, 1):
            hidden, gradient = None, None
            for runner in runners:
                hidden = runner.forward(tick, make_batch(tick), None, hidden)
            for runner in reversed(runners):
                own, gradient = runner.backward(tick, gradient, closing=tick == 1)
                if with_replicas:
                    started[runner.index, tick] = len(means[runner.index].log)
                    # Only the tied matrix is complete after the backward, not within it.
                    assert tick == 0 or own.keys() <= set(partition.tied_names)
                runner.accumulate(own)
        for runner in runners:
            runner.start_mean()
            runner.finish_mean()
        windows[with_replicas] = [runner.window for runner in runners]
    for alone, averaged in zip(windows[False], windows[True], strict=True):
        assert alone.keys() == averaged.keys()
        assert all(torch.equal(2 * alone[name], averaged[name]) for name in alone)
    assert all(started[k, 0] == 0 and started[k, 1] > 1 for k in stages)
