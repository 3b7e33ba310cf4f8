"""What scripts do, combined: stock Trainer's numbers, or the reference's, or a named error before the first update.

HF_OUROBOROS_SCRIPT_EXAMPLES sets how many combinations are tried, at random if it is set.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from script_runs import Script
from trainer_helpers import differing, tiny_model
from transformers import Trainer

from hf_ouroboros import OuroborosError

EXAMPLES = int(os.environ.get("HF_OUROBOROS_SCRIPT_EXAMPLES", 0))


def scaled(module: Any, inputs: Any, output: Any) -> Any:
    return (output[0] * 0.9, *output[1:]) if isinstance(output, tuple) else output * 0.9


def noisy(draw: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda module, inputs, output: output * draw(output) if module.training else None


HOOKS: dict[str, Callable[[Trainer], Any]] = {
    "none": lambda t: None,
    "gradient of a parameter": lambda t: t.model.transformer.wpe.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3)),
    "accumulated": lambda t: t.model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5)),
    "layer": lambda t: t.model.transformer.h[1].register_forward_hook(scaled),
    "before a layer": lambda t: t.model.transformer.h[2].register_forward_pre_hook(lambda m, i: (i[0] * 0.9, *i[1:])),
    "gradient of a module": lambda t: t.model.transformer.h[3].mlp.register_full_backward_hook(
        lambda m, i, o: (i[0] / 2,)
    ),
    "around the layers": lambda t: t.model.transformer.register_forward_hook(lambda m, i, o: type(o)(o[0] * 0.5)),
    "before the model": lambda t: t.model.register_forward_pre_hook(lambda m, i: None),
}
NOISE: dict[str, Callable[[Trainer], Any]] = {
    "none": lambda t: None,
    "depth": lambda t: t.model.transformer.h[1].mlp.register_forward_hook(noisy(lambda o: torch.rand(1) > 0.3)),
    "normal": lambda t: t.model.transformer.h[4].mlp.register_forward_hook(
        noisy(lambda o: 1 + 0.1 * torch.randn_like(o))
    ),
    "Python": lambda t: t.model.transformer.h[3].mlp.register_forward_hook(noisy(lambda o: random.random())),
}
PENALTIES: dict[str, Callable[[Trainer], torch.Tensor | float]] = {
    "none": lambda t: 0.0,
    "all": lambda t: 0.1 * sum(p.square().sum() for p in t.model.parameters()),
    "head": lambda t: 0.1 * t.model.lm_head.weight.square().sum(),
}


def with_closure(trainer: Trainer, penalty: str) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        value = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1) / num_items_in_batch
        return value + PENALTIES[penalty](trainer)

    trainer.compute_loss_func = loss


def check(
    kind: str, loss: str, hook: str, noise: str, penalty: str, dropout: bool, recompute: bool, ticks: int
) -> None:
    """One combination."""

    def prepare(trainer: Trainer) -> None:
        HOOKS[hook](trainer)
        NOISE[noise](trainer)
        if loss == "closure" or penalty != "none":
            with_closure(trainer, penalty)

    options: dict[str, Any] = {"max_steps": 2, "gradient_accumulation_steps": ticks}
    if loss == "smoothing":
        options["label_smoothing_factor"] = 0.1

    def run(kind: str, **more: Any) -> dict[str, torch.Tensor] | OuroborosError:
        made = Script(prepare, lambda: tiny_model(tied=False, dropout=0.1 * dropout), None, **options, **more)
        with tempfile.TemporaryDirectory() as folder:
            return made.run(Path(folder), kind)

    alone = kind == "alone"
    found = run(kind, recompute=recompute)
    if noise == "Python" or (not alone and (penalty != "none" or hook == "before the model")):
        assert isinstance(found, OuroborosError)
        return
    if dropout or noise != "none" or kind in ("lockstep", "pipelined"):
        drained = {"delay_warmup_steps": 100} if kind == "1f1b" else {}
        expected = run("reference", **drained, **({"num_stages": 1, "devices": ["cpu:0"]} if alone else {}))
    else:
        expected = run("stock")
    assert isinstance(expected, dict) and isinstance(found, dict), (expected, found)
    assert differing(expected, found) == []


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES or 12,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    kind=st.sampled_from(["pipelined", "alone", "1f1b", "lockstep"]),
    loss=st.sampled_from(["own", "closure", "smoothing"]),
    hook=st.sampled_from(list(HOOKS)),
    noise=st.sampled_from(list(NOISE)),
    penalty=st.sampled_from(["none", "none", *PENALTIES]),
    dropout=st.booleans(),
    recompute=st.booleans(),
    ticks=st.sampled_from([1, 2]),
)
def test_equal_or_refused(**features: Any) -> None:
    check(**features)
