"""The faces that Trainer sees: logits, loss, parameters and optimizer are those of the ordinary model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainer_helpers import Rows, assert_same, copied, split_options, tiny_model
from transformers.modeling_outputs import CausalLMOutput

from hf_ouroboros import split_model
from hf_ouroboros.errors import EngineError
from hf_ouroboros.head_model import HeadModel, causal_lm_output
from hf_ouroboros.staged import StagedModel, StagedOptimizer


def batch(count: int = 4) -> dict[str, torch.Tensor]:
    rows = [Rows(count)[i] for i in range(count)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def staged(model: Any, stages: int = 3, dtype: torch.dtype | None = None) -> StagedModel:
    options = split_options(stages, max(1, stages - 1))
    return StagedModel(split_model(model, options["devices"], num_stages=stages), dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stages", [1, 3])
def test_forward_is_the_models(tied: bool, stages: int) -> None:
    model = tiny_model(tied=tied)
    model.loss_type = "ForCausalLM"
    face = staged(model, stages).eval()
    with torch.no_grad():
        expected, found = model(**batch()), face(**batch())
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    with torch.no_grad():
        scaled = face(**batch(), num_items_in_batch=torch.tensor(7))
    count = batch()["labels"][:, 1:].ne(-100).sum()
    # One division by 7 instead of one by the number of targets.
    torch.testing.assert_close(scaled.loss * 7, expected.loss * count, rtol=1e-6, atol=0)


def test_forward_without_labels() -> None:
    output = staged(tiny_model()).eval()(input_ids=batch()["input_ids"])
    assert output.loss is None and "loss" not in output
    assert output.logits.shape == (4, 10, 61)


def test_shifted_labels() -> None:
    given = batch()
    shifted = torch.nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    logits = torch.randn(4, 10, 61)
    expected = causal_lm_output(logits, {"labels": given["labels"]}).loss
    assert torch.equal(causal_lm_output(logits, {"shift_labels": shifted}).loss, expected)


def test_mixed_precision_gives_float32_logits() -> None:
    face = staged(tiny_model(), dtype=torch.bfloat16).eval()
    exact = staged(tiny_model()).eval()
    with torch.no_grad():
        found, expected = face(**batch()).logits, exact(**batch()).logits
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)  # bfloat16 has 8 bits


def test_parameters_are_the_models() -> None:
    model = tiny_model()
    face = staged(model)
    assert {id(p) for p in face.parameters()} == {id(p) for p in model.parameters()}
    assert face._get_name() == "GPT2LMHeadModel"
    assert face.config is model.config


def test_modes_and_gradients() -> None:
    model = tiny_model()
    face = staged(model)
    for mode in (False, True):
        face.train(mode)
        assert all(module.training is mode for module in model.modules())
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    face.zero_grad()
    assert model.lm_head.weight.grad is not None, "gradients are the workers'"


def test_head_model() -> None:
    model, logits = tiny_model(), torch.randn(4, 10, 61)
    calls: list[dict[str, Any]] = []

    def call(**inputs: Any) -> CausalLMOutput:
        calls.append(inputs)
        return CausalLMOutput(loss=logits.sum(), logits=logits)

    stand_in = HeadModel(model, call, without_labels=False)
    assert stand_in._get_name() == "GPT2LMHeadModel" and stand_in.config is model.config
    output = stand_in(**batch(), stream_columns=torch.arange(4))
    assert output.logits is logits and torch.equal(output.loss, logits.sum())
    assert calls[0].keys() == batch().keys()
    for ask in (stand_in.parameters, stand_in.named_parameters):
        with pytest.raises(EngineError, match="compute_loss asks for the model's parameters"):
            ask()


class FakeEngine:
    """Writes down what the optimizer tells it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append(name)


@pytest.fixture
def optimizer() -> StagedOptimizer:
    model = tiny_model()
    face = StagedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1))
    face.engine = FakeEngine()
    return face


def test_optimizer_steps_the_engine_only(optimizer: StagedOptimizer) -> None:
    weights = copied([group["params"] for group in optimizer.param_groups])
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.engine.calls == ["step"]
    assert_same({"w": weights}, {"w": [group["params"] for group in optimizer.param_groups]})
    assert optimizer.state_dict()["state"] == {}


def test_optimizer_face_is_an_optimizer(optimizer: StagedOptimizer) -> None:
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.state is optimizer.optimizer.state
    assert optimizer.defaults["lr"] == 0.1
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


@pytest.mark.parametrize("on_face", [True, False])
def test_schedulers_work_on_face_and_on_the_complete_optimizer(optimizer: StagedOptimizer, on_face: bool) -> None:
    target = optimizer if on_face else optimizer.optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(target, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()  # pytest shows no warning about the order of the calls
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_optimizer_tells_the_engine_of_new_state(optimizer: StagedOptimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.engine.calls == ["synchronize", "rest", "attach"]
