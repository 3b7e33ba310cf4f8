"""The loss that a script means: its own model's, its own function's, Trainer's scale; or a named error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from script_runs import Script, assert_equal
from torch import nn
from torch.utils.data import Dataset
from trainer_helpers import ExactTrainer, Rows, assert_same, logged, stock, tiny_model, trained
from transformers import GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from hf_ouroboros import OuroborosTrainer
from hf_ouroboros.errors import WorkerError


def plain_model() -> GPT2LMHeadModel:
    """Untied: the two sides of a tied matrix are added up in another order than stock Trainer's."""
    return tiny_model(tied=False, dropout=0.0)


class OwnForward(GPT2LMHeadModel):
    """Another loss, in training mode only, and a parameter that starts at zero and belongs to no module of its own."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.shift = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> CausalLMOutput:
        """See `GPT2LMHeadModel`."""
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        output.logits = output.logits + self.shift
        if labels is not None and self.training:
            output.loss = output.loss + 0.1 * output.logits.square().mean()
        return output


def own_forward() -> GPT2LMHeadModel:
    """A model whose class has its own forward."""
    plain = plain_model()
    with torch.random.fork_rng(devices=[]):
        model = OwnForward(plain.config)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model


def own_function() -> GPT2LMHeadModel:
    """A model with another loss function."""
    model = plain_model()

    def smoothed(logits: Any, labels: Any, vocab_size: int, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        total = F.cross_entropy(logits.flatten(0, 1), shifted, label_smoothing=0.2, reduction="sum")
        return total / (num_items_in_batch or (shifted != -100).sum())

    model.loss_function = smoothed
    return model


def without_loss_kwargs() -> GPT2LMHeadModel:
    """A model that does not want the number of items."""
    model = plain_model()
    model.accepts_loss_kwargs = False
    return model


class OwnComputeLoss:
    """A script's trainer with a loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()) * 2
        return (loss, outputs) if return_outputs else loss


class OwnStock(OwnComputeLoss, ExactTrainer):
    """On stock Trainer."""


class OwnOuroboros(OwnComputeLoss, OuroborosTrainer):
    """On ours."""


KINDS: dict[str, tuple[Callable[[], GPT2LMHeadModel], bool]] = {
    "forward": (own_forward, False),
    "loss_function": (own_function, False),
    "accepts_loss_kwargs": (without_loss_kwargs, False),
    "compute_loss": (lambda: plain_model(), True),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_stock(kind: str, tmp_path: Path) -> None:
    make, own = KINDS[kind]
    options: dict[str, Any] = {"max_steps": 3, "max_grad_norm": 0.0}
    expected = stock(tmp_path / "stock", {"model": make(), **({"cls": OwnStock} if own else {})}, **options)
    expected.train()
    given = {"model": make(), **({"cls": OwnOuroboros} if own else {})}
    found = trained(tmp_path / "ours", given, schedule="1f1b", num_stages=3, devices=["cpu:0", "cpu:1"], **options)
    assert_same(expected, found)
    assert logged(found, "train_loss") == pytest.approx(logged(expected, "train_loss"), rel=1e-6)  # summed in float32
    assert found.evaluate()["eval_loss"] == pytest.approx(
        expected.evaluate()["eval_loss"], rel=0.05
    )  # by tokens, by rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_reference(kind: str, tmp_path: Path) -> None:
    make, own = KINDS[kind]
    runs = []
    for schedule in ("reference", "pipelined"):
        given = {"model": make(), **({"cls": OwnOuroboros} if own else {})}
        runs.append(trained(tmp_path / schedule, given, schedule=schedule, num_stages=3, devices=["cpu:0", "cpu:1"]))
    assert_same(*runs)


@pytest.mark.slow
def test_a_trainer_that_does_not_give_the_number_of_items(tmp_path: Path) -> None:
    def prepare(trainer: Any) -> None:
        trainer.model_accepts_loss_kwargs = False

    assert_equal(tmp_path, Script(prepare), exact=("1f1b",), delayed=())


class Embedded(Dataset):
    """Rows of embeddings instead of token ids."""

    def __init__(self, count: int):
        self.rows = Rows(count, masks=False)
        self.table = torch.randn(61, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        return {"inputs_embeds": self.table[row["input_ids"]], "labels": row["labels"]}


@pytest.mark.slow
def test_embeddings_as_inputs(tmp_path: Path) -> None:
    """Of a tied matrix, the head's side alone has a gradient then."""
    runs = []
    for make in (stock, trained):
        given: dict[str, Any] = {"model": tiny_model(dropout=0.0), "train_dataset": Embedded(18)}
        ours = {"schedule": "1f1b", "num_stages": 3, "devices": ["cpu:0", "cpu:1"]} if make is trained else {}
        runs.append(make(tmp_path / make.__name__, given, max_steps=2, max_grad_norm=0.0, **ours))
    runs[0].train()
    assert_same(*runs)


def twice(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Consistency of two calls."""
    return model(**inputs).loss + model(**inputs).loss


def other_tokens(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Word dropout."""
    return model(**{**inputs, "input_ids": inputs["input_ids"].clamp(max=5)}).loss


def penalty(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """A penalty on the weights."""
    return model(**inputs).loss + 0.1 * sum(p.square().sum() for p in model.parameters())


def hidden_states(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """A loss of hidden states."""
    return model(**inputs, output_hidden_states=True).hidden_states[1].mean()


@pytest.mark.slow
@pytest.mark.parametrize("loss", [twice, other_tokens, penalty, hidden_states])
def test_a_single_stage_can_do_it(loss: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    class Own:
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return loss(model, inputs)

    assert_equal(tmp_path, Script(mixin=Own), exact=("alone",), delayed=())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["pipelined", "reference"])
@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (twice, "calls the model a second time"),
        (other_tokens, "calls the model with another input_ids than the batch's"),
        (penalty, "asks for the model's parameters"),
        (hidden_states, "output_hidden_states=True asks for what layers of other stages put out"),
    ],
)
def test_what_stages_can_not_do_is_refused_before_the_first_update(
    schedule: str, loss: Callable[..., torch.Tensor], why: str, tmp_path: Path
) -> None:
    class Script(OuroborosTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return loss(model, inputs)

    model = plain_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((WorkerError, Exception), match=why):
        trained(tmp_path, {"model": model, "cls": Script}, schedule=schedule, num_stages=3, devices=["cpu:0", "cpu:1"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@torch.compile(backend="eager")
def compiled(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A loss that is compiled when it is first called, for which the compiler looks at the states of generators."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_compiled_loss(tmp_path: Path) -> None:
    class Own:
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return compiled(model(**inputs).logits, inputs["labels"])

    assert_equal(tmp_path, Script(mixin=Own), delayed=())
