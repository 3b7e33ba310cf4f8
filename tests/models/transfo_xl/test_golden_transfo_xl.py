"""Every figure of transformers 4.57.6's Transformer-XL, for eleven kinds of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import hf_ouroboros.models.transfo_xl  # noqa: F401  registers the model

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/golden.json"))
IMPLEMENTATIONS = ("sdpa", "eager")


class Case:
    """A checkpoint and what the reference made of it."""

    def __init__(self, name: str, implementation: str):
        self.tensors = load_file(FIXTURES / name / "golden.safetensors")
        self.facts = json.loads((FIXTURES / name / "golden.json").read_text())
        self.model = AutoModelForCausalLM.from_pretrained(FIXTURES / name, attn_implementation=implementation).eval()

    def check(self, found: torch.Tensor, name: str, kind: str = "outputs") -> None:
        """Ten times the float32 rounding of the reference itself, as its README asks for."""
        tolerance = max(10 * self.facts["noise_fp32_vs_fp64"][kind], 1e-5)
        torch.testing.assert_close(found, self.tensors[name], atol=tolerance, rtol=0.0)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, implementation: str) -> Case:
    return Case(request.param, implementation)


def batch_first(stacked: torch.Tensor) -> list[torch.Tensor]:
    """Memories of the reference, [layers, rows, batch, d_model], as ours."""
    return list(stacked.transpose(1, 2))


def test_consecutive_segments(case: Case) -> None:
    mems: Any = None
    for s in range(3):
        with torch.no_grad():
            output = case.model(
                case.tensors[f"seg{s}.input_ids"], mems=mems, output_hidden_states=True, output_attentions=s == 1
            )
        mems = output.mems
        case.check(output.logits, f"seg{s}.logprobs")
        case.check(output.hidden_states[-1], f"seg{s}.last_hidden")
        case.check(torch.stack(tuple(mems)).transpose(1, 2), f"seg{s}.mems")
        if s == 1:
            case.check(torch.stack(output.attentions), "seg1.attn")


def test_sdpa_without_attentions_too(case: Case) -> None:
    mems = batch_first(case.tensors["seg0.mems"])
    with torch.no_grad():
        case.check(case.model(case.tensors["seg1.input_ids"], mems=mems).logits, "seg1.logprobs")


def test_loss_and_gradients(case: Case) -> None:
    mems = batch_first(case.tensors["seg0.mems"])
    output = case.model(case.tensors["seg1.input_ids"], mems=mems, labels=case.tensors["train.labels"])
    output.loss.backward()
    case.check(output.loss.detach().reshape(1), "train.loss")
    case.check(output.losses.detach(), "train.nll")
    parameters = dict(case.model.named_parameters(remove_duplicate=False))
    for name in case.tensors:
        if name.startswith("grad."):
            case.check(parameters[name.removeprefix("grad.")].grad, name, "grads")
    for name, norm in case.facts["grad_norm"].items():
        # Norms are recorded with six decimals.
        assert float(parameters[name].grad.norm()) == pytest.approx(norm, abs=2e-6, rel=1e-5)
    assert {name for name, parameter in parameters.items() if parameter.grad is None} == set()


def test_greedy_ids(case: Case) -> None:
    ids = case.tensors["seg2.input_ids"]
    generated = case.model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(generated[:, ids.shape[1] :], case.tensors["greedy"])


def test_the_same_parameters_are_tied(case: Case) -> None:
    ours: dict[int, set[str]] = {}
    for name, parameter in case.model.named_parameters(remove_duplicate=False):
        ours.setdefault(id(parameter), set()).add(name)
    tied = {frozenset(names) for names in ours.values() if len(names) > 1}
    # Relative biases that all layers share are one parameter of the model here, without aliases in the layers.
    assert tied == {frozenset(names) for names in case.facts["tied"] if not names[0].endswith(("r_w_bias", "r_r_bias"))}


def test_all_kinds_are_there() -> None:
    assert len(CASES) == 11


@pytest.mark.parametrize("name", CASES)
def test_old_configs_attend_to_zero_rows(name: str) -> None:
    assert AutoConfig.from_pretrained(FIXTURES / name).mem_init == "zeros"
