"""Without delay, OuroborosSFTTrainer's weights and metrics are those of TRL's SFTTrainer; with one, the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sft_cases import options, rows, tiny, tokenizer
from trainer_helpers import differing, logged, outcome, split_options
from transformers import BitsAndBytesConfig, PrinterCallback
from trl import SFTConfig, SFTTrainer

import hf_ouroboros.trl
from hf_ouroboros import UnsupportedOptionError
from hf_ouroboros.trl import OuroborosSFTConfig, OuroborosSFTTrainer

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {}),
    "chat": ("chat", {}),
    "assistant only": ("chat", {"assistant_only_loss": True}),
    "completion only": ("prompt", {}),
    "whole prompts": ("prompt", {"completion_only_loss": False}),
    "packing": ("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "padding free": ("text", {"padding_free": True, "max_length": None}),
    "packing bfd": ("text", {"packing": True}),
    "dft": ("prompt", {"loss_type": "dft"}),
    "label smoothing": ("prompt", {"label_smoothing_factor": 0.1}),
}
METRICS = ("entropy", "mean_token_accuracy", "num_tokens")


def stock(folder: Path, case: str, **given: Any) -> SFTTrainer:
    kind, more = CASES[case]
    args = SFTConfig(**options(folder, gradient_checkpointing=False, **more))
    made = SFTTrainer(tiny(), args, train_dataset=rows(kind), processing_class=tokenizer(), **given)
    made.remove_callback(PrinterCallback)
    made.train()
    return made


def ours(folder: Path, case: str, trainer: dict[str, Any] | None = None, **given: Any) -> OuroborosSFTTrainer:
    kind, more = CASES[case]
    args = OuroborosSFTConfig(**options(folder, **{**split_options(2, 2), **more, **given}))
    given = {"train_dataset": rows(kind), "processing_class": tokenizer(), **(trainer or {})}
    made = OuroborosSFTTrainer(given.pop("model", None) or tiny(), args, **given)
    made.remove_callback(PrinterCallback)
    return made


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_without_delay_it_is_trl(case: str, tmp_path: Path) -> None:
    expected = stock(tmp_path / "stock", case)
    found = ours(tmp_path / "ours", case, schedule="1f1b")
    found.train()
    # The losses are sums in other orders: of log-probabilities here, in TRL of tiles.
    torch.testing.assert_close(weights(expected), weights(found), rtol=0, atol=1e-3)
    assert (
        max(float((a - b).abs().max()) for a, b in zip(weights(found).values(), tiny().parameters(), strict=True))
        > 0.01
    )
    before = found.state.log_history[-1]
    assert before["train_loss"] == pytest.approx(expected.state.log_history[-1]["train_loss"], rel=1e-3)
    assert logged(found, "num_tokens")[-1] == logged(expected, "num_tokens")[-1]
    for name in METRICS:
        assert logged(found, name) == pytest.approx(logged(expected, name), rel=1e-2), name


@pytest.mark.parametrize("case", ["text", "assistant only", "padding free"])
def test_with_delay_it_is_the_reference(case: str, tmp_path: Path) -> None:
    runs = [ours(tmp_path / schedule, case, schedule=schedule) for schedule in ("reference", "pipelined")]
    for run in runs:
        run.train()
    assert differing(outcome(runs[0]), outcome(runs[1])) == []
    for name in (*METRICS, "loss"):  # however late they come
        assert len(logged(runs[1], name)) == 3 and logged(runs[1], name) == logged(runs[0], name)
    assert runs[1].args.recompute  # TRL's gradient_checkpointing


def test_logs_of_several_updates(tmp_path: Path) -> None:
    """Every log is about its own updates, what is left over comes with the end of the run, and tokens are counted as in TRL."""
    often = {"max_steps": 5, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    data = {"eval_dataset": rows("text", 4, seed=1)}
    args = SFTConfig(**options(tmp_path / "stock", gradient_checkpointing=False, **often))
    expected = SFTTrainer(tiny(), args, train_dataset=rows("text"), processing_class=tokenizer(), **data)
    found = ours(tmp_path / "ours", "text", data, schedule="1f1b", **often)
    for run in (expected, found):
        run.train()
    for name in (*METRICS, *(f"eval_{name}" for name in METRICS)):
        theirs = logged(expected, name)  # TRL leaves out what is left over where the last step was evaluated
        assert logged(found, name)[: len(theirs)] == pytest.approx(theirs, rel=1e-2), name
    assert len(logged(found, "entropy")) == 3 and len(logged(found, "eval_num_tokens")) == 5


def test_metrics_are_those_of_trl(tmp_path: Path) -> None:
    """In the reference's order of things every tick's metrics are there when its update is logged."""
    expected, found = (
        stock(tmp_path / "stock", "text"),
        ours(tmp_path / "ours", "text", schedule="reference", num_stages=1),
    )
    found.train()
    for name in METRICS:
        assert logged(found, name) == pytest.approx(logged(expected, name), rel=1e-3), name


def test_evaluation(tmp_path: Path) -> None:
    given = {"eval_dataset": rows("text", 6, seed=1)}
    expected = stock(tmp_path / "stock", "text", **given)
    found = ours(tmp_path / "ours", "text", given, schedule="1f1b", eval_strategy="steps", eval_steps=1)
    found.train()
    wanted, metrics = expected.evaluate(), found.evaluate()
    assert metrics["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=0.05)  # by tokens here, by batches there
    for name in METRICS[:2]:
        assert logged(found, f"eval_{name}")[-1] == pytest.approx(logged(expected, f"eval_{name}")[-1], rel=1e-3)
    assert len(logged(found, "eval_entropy")) == 4
    assert logged(found, "num_tokens")[-1] == logged(expected, "num_tokens")[-1]


@pytest.mark.slow
def test_adapters_checkpoints_and_card(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def made(folder: str) -> OuroborosSFTTrainer:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        saving = {"save_strategy": "steps", "save_steps": 2}
        return ours(tmp_path / folder, "chat", {"peft_config": config}, **saving)

    expected = made("run")
    expected.train()
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    again = made("again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert differing(outcome(expected), outcome(again)) == []
    card = (tmp_path / "run" / "README.md").read_text()
    assert all(text in card for text in ("library_name: peft", "- ouroboros", "- sft", "1909.06695"))
    expected.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(tiny(), tmp_path / "saved").state_dict()
    assert differing(outcome(expected)["weights"], dict(loaded)) == []


@pytest.mark.slow
def test_on_packed_matrices(tmp_path: Path) -> None:
    """With adapters in bfloat16, as TRL makes them on a quantized model."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes", reason="needs the extra `bnb`: pip install -e '.[bnb]'")
    tiny().save_pretrained(tmp_path / "model")

    def given() -> dict[str, Any]:
        return {
            "model": str(tmp_path / "model"),
            "peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            "train_dataset": rows("text"),
            "processing_class": tokenizer(),
        }

    expected = SFTTrainer(args=SFTConfig(**options(tmp_path / "stock", gradient_checkpointing=False)), **given())
    expected.train()
    found = ours(tmp_path / "ours", "text", given(), schedule="1f1b")
    found.train()
    trained = [{n: p for n, p in weights(run).items() if "lora" in n} for run in (expected, found)]
    assert trained[0] and all(p.dtype is torch.bfloat16 for p in trained[1].values())
    torch.testing.assert_close(*trained, rtol=0, atol=2e-3)  # the rounding of bfloat16
    runs = [ours(tmp_path / schedule, "text", given(), schedule=schedule) for schedule in ("reference", "pipelined")]
    for run in runs:
        run.train()
    assert differing(outcome(runs[0]), outcome(runs[1])) == []


def test_refusals(tmp_path: Path) -> None:
    for given, words in (
        ({"activation_offloading": True}, "activation_offloading=True"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"gradient_checkpointing_kwargs": {"selective": True}}, "gradient_checkpointing_kwargs"),
    ):
        with pytest.raises(UnsupportedOptionError, match=words):
            OuroborosSFTConfig(**options(tmp_path, **given))
    with pytest.raises(UnsupportedOptionError, match="needs an OuroborosSFTConfig"):
        OuroborosSFTTrainer(tiny(), SFTConfig(**options(tmp_path)), train_dataset=rows("text"))


def test_other_releases_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("1.15.2", "1.17.0"):
        monkeypatch.setattr(hf_ouroboros.trl, "version", lambda name, found=found: found)
        with pytest.raises(ImportError, match=f"needs trl>=1.16,<1.17, found {found}"):
            hf_ouroboros.trl.check_version()
