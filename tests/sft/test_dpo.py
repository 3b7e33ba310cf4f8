"""Without delay, OuroborosDPOTrainer's weights and metrics are those of TRL's DPOTrainer; with one, the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sft_cases import options, preferences, tiny, tokenizer
from trainer_helpers import EVERY, differing, logged, outcome, split_options
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from hf_ouroboros import UnsupportedOptionError
from hf_ouroboros.trl import OuroborosDPOConfig, OuroborosDPOTrainer
from hf_ouroboros.trl.fused_head import fused_output

CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "two losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.5]},
    "exo": {"loss_type": ["exo_pair"], "label_smoothing": 0.1, "ld_alpha": 0.5, "use_weighting": True},
}
MORE: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": [name]} for name in ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "sft")},
    **{name: {"loss_type": [name]} for name in ("aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm")},
    "divergence": {"f_divergence_type": "js_divergence"},
    "smoothed": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "end kept": {"truncation_mode": "keep_end", "max_length": 12},
}
CASES |= MORE if EVERY else {}
METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"),
    *("logits/chosen", "logits/rejected", "mean_token_accuracy", "entropy", "num_tokens", "loss"),
)


def stock(folder: Path, case: str = "sigmoid", trainer: dict[str, Any] | None = None, **given: Any) -> DPOTrainer:
    given = {"gradient_checkpointing": False, "precompute_ref_log_probs": True, **CASES[case], **given}
    made = DPOTrainer(args=DPOConfig(**options(folder, **given)), **arguments(trainer))
    made.remove_callback(PrinterCallback)
    return made


def ours(
    folder: Path, case: str = "sigmoid", trainer: dict[str, Any] | None = None, **given: Any
) -> OuroborosDPOTrainer:
    args = OuroborosDPOConfig(**options(folder, **{**split_options(2, 2), **CASES[case], **given}))
    made = OuroborosDPOTrainer(args=args, **arguments(trainer))
    made.remove_callback(PrinterCallback)
    return made


def arguments(given: dict[str, Any] | None) -> dict[str, Any]:
    data = {"train_dataset": preferences(), "processing_class": tokenizer(), **(given or {})}
    return data if "model" in data else {"model": tiny(), **data}


def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2, task_type="CAUSAL_LM")


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_without_delay_it_is_trl(case: str, tmp_path: Path) -> None:
    expected, found = stock(tmp_path / "stock", case), ours(tmp_path / "ours", case, schedule="1f1b")
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        torch.testing.assert_close(
            torch.tensor(expected.train_dataset[column]), torch.tensor(found.train_dataset[column])
        )
    expected.train()
    found.train()
    # Log-probabilities are sums in other orders: of all logits here, in TRL of tiles.
    torch.testing.assert_close(weights(expected), weights(found), rtol=0, atol=2e-5)
    moved = [a - b for a, b in zip(weights(found).values(), tiny().parameters(), strict=True)]
    assert max(float(d.abs().max()) for d in moved) > 0.01
    for name in ("train_loss", "num_tokens"):
        last = [entry.state.log_history[-1 if name == "train_loss" else -2][name] for entry in (expected, found)]
        assert last[1] == pytest.approx(last[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True] if EVERY else [True], ids=str)
def test_with_delay_it_is_the_reference(adapted: bool, tmp_path: Path) -> None:
    runs = []
    for schedule in ("reference", "pipelined"):
        trainer = {"peft_config": lora()} if adapted else {}
        runs.append(ours(tmp_path / schedule, trainer=trainer, schedule=schedule))
        runs[-1].train()
    assert differing(outcome(runs[0]), outcome(runs[1])) == []
    assert runs[1].args.recompute  # TRL's gradient_checkpointing


def test_metrics_are_those_of_trl(tmp_path: Path) -> None:
    """In the reference's order of things every tick's metrics are there when its update is logged."""
    data = {"eval_dataset": preferences(6, seed=1)}
    often = {"eval_strategy": "steps", "eval_steps": 1}
    expected = stock(tmp_path / "stock", trainer=data, **often)
    found = ours(tmp_path / "ours", trainer=data, schedule="reference", num_stages=1, **often)
    for run in (expected, found):
        run.train()
    for name in METRICS:
        assert len(logged(expected, name)) == 3
        assert logged(found, name) == pytest.approx(logged(expected, name), rel=1e-3, abs=1e-4), name
        assert logged(found, f"eval_{name}") == pytest.approx(logged(expected, f"eval_{name}"), rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_metrics_under_delay_are_their_ticks(tmp_path: Path) -> None:
    """Every tick's metrics are logged with its loss, whenever they come."""
    runs = []
    for schedule in ("reference", "pipelined"):
        runs.append(ours(tmp_path / schedule, schedule=schedule, max_steps=6, logging_steps=2))
        runs[-1].train()
    for name in METRICS:
        assert len(logged(runs[1], name)) == 3 and logged(runs[1], name) == logged(runs[0], name), name


@pytest.mark.slow
@pytest.mark.parametrize("adapted", ["config", "model"])
def test_adapters(adapted: str, tmp_path: Path) -> None:
    """On new adapters the reference is the model below them; on those that are there, the model with them."""
    peft = pytest.importorskip("peft")

    def trainer() -> dict[str, Any]:
        if adapted == "config":
            return {"peft_config": lora()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = peft.get_peft_model(tiny(), lora())
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.05 * torch.randn_like(parameter)
        return {"model": model}

    expected = stock(tmp_path / "stock", trainer=trainer())
    found = ours(tmp_path / "ours", trainer=trainer(), schedule="1f1b", save_strategy="steps", save_steps=2)
    torch.testing.assert_close(
        torch.tensor(expected.train_dataset["ref_chosen_logps"]), torch.tensor(found.train_dataset["ref_chosen_logps"])
    )
    expected.train()
    found.train()
    theirs = {name: value for name, value in weights(expected).items() if ".ref." not in name}
    torch.testing.assert_close(theirs, weights(found), rtol=0, atol=1e-5)
    again = ours(tmp_path / "again", trainer=trainer(), schedule="1f1b")
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert differing(outcome(found), outcome(again)) == []
    card = (tmp_path / "ours" / "README.md").read_text()
    assert all(text in card for text in ("library_name: peft", "- ouroboros", "- dpo", "1909.06695"))
    if adapted == "config":  # the model below the adapters is still there
        found.evaluate(preferences(4, seed=2))
    else:
        with pytest.raises(UnsupportedOptionError, match="the model is no reference any more"):
            found.evaluate(preferences(4, seed=2))


def test_reference_is_the_model_below_the_adapters(tmp_path: Path) -> None:
    """Also when they have been trained; they are on again afterwards, and are trained as before."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    trainer = ours(tmp_path, trainer={"peft_config": config})
    trainer.train()
    ids = torch.randint(5, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    below = fused_output(tiny()(input_ids=ids).logits, {"labels": ids}).log_probs
    before = fused_output(trainer.model(input_ids=ids).logits, {"labels": ids}).log_probs
    found = trainer._reference(ids, input_ids=ids).log_probs
    after = fused_output(trainer._staged.eval()(input_ids=ids).logits, {"labels": ids}).log_probs
    assert torch.equal(found, below) and torch.equal(after, before) and not torch.equal(before, below)
    assert all(p.requires_grad == ("lora" in n or "modules_to_save" in n) for n, p in trainer.model.named_parameters())


def test_refusals(tmp_path: Path) -> None:
    for given, words in (
        ({"precompute_ref_log_probs": False}, "precompute_ref_log_probs=False: a reference computed on the fly"),
        ({"sync_ref_model": True}, "sync_ref_model=True"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"activation_offloading": True}, "activation_offloading=True"),
    ):
        with pytest.raises(UnsupportedOptionError, match=words):
            OuroborosDPOConfig(**options(tmp_path, **given))
    with pytest.raises(UnsupportedOptionError, match="needs an OuroborosDPOConfig"):
        OuroborosDPOTrainer(tiny(), args=DPOConfig(**options(tmp_path)), train_dataset=preferences())
    with pytest.raises(UnsupportedOptionError, match="ref_model is a LlamaForCausalLM"):
        ours(tmp_path, trainer={"ref_model": tiny()})
    rows = Dataset.to_iterable_dataset(preferences())
    with pytest.raises(UnsupportedOptionError, match="is a IterableDataset: the reference's"):
        ours(tmp_path, trainer={"train_dataset": rows})
