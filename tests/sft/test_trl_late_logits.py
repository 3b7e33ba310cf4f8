"""TRL's losses and metrics with a head that does not build its logits, and what scripts compute of logits themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sft_cases import options, preferences, rows, tiny, tokenizer
from trainer_helpers import differing, logged, outcome, split_options
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_ouroboros.engine.core import Engine
from hf_ouroboros.partition.late_logits import LateLogits
from hf_ouroboros.trl import OuroborosDPOConfig, OuroborosDPOTrainer, OuroborosSFTConfig, OuroborosSFTTrainer

KINDS: dict[str, tuple[Any, ...]] = {
    "sft": (SFTTrainer, SFTConfig, OuroborosSFTTrainer, OuroborosSFTConfig),
    "dpo": (DPOTrainer, DPOConfig, OuroborosDPOTrainer, OuroborosDPOConfig),
}
METRICS = {
    "sft": ("entropy", "mean_token_accuracy", "num_tokens"),
    "dpo": ("entropy", "mean_token_accuracy", "num_tokens", "rewards/margins", "logits/chosen", "logps/rejected"),
}


def run(kind: str, folder: Path, cls: Any = None, **given: Any) -> Any:
    """A run of this package's trainer, or of TRL's where a folder is called so."""
    own = folder.name != "stock"
    trainer, config = KINDS[kind][2:] if own else KINDS[kind][:2]
    more = {"fused_head": "on", **split_options(2, 2)} if own else {"gradient_checkpointing": False}
    if kind == "dpo":
        more["precompute_ref_log_probs"] = True
    args = config(**options(folder, eval_strategy="steps", eval_steps=1, **{**more, **given}))
    data = [preferences(seed=0), preferences(6, seed=1)] if kind == "dpo" else [rows("chat"), rows("chat", 6, seed=1)]
    made = (cls or trainer)(
        model=tiny(), args=args, processing_class=tokenizer(), train_dataset=data[0], eval_dataset=data[1]
    )
    made.train()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_never_made(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more: dict[str, Any] = {"assistant_only_loss": True} if kind == "sft" else {}
    expected = run(kind, tmp_path / "stock", **more)
    monkeypatch.setattr(LateLogits, "made", lambda self: pytest.fail("somebody looks at logits"))
    monkeypatch.setattr(Engine, "account_for_open", lambda self: pytest.fail("a tick is waited for"))
    reference, found, plain = (
        run(kind, tmp_path / name, **more, **given)
        for name, given in (
            ("reference", {"schedule": "reference"}),
            ("pipelined", {}),
            ("1f1b", {"schedule": "1f1b"}),
        )
    )
    assert differing(outcome(reference), outcome(found)) == []
    theirs = {name: value for name, value in expected.model.state_dict().items()}
    torch.testing.assert_close(dict(plain.model.state_dict()), theirs, rtol=0, atol=1e-4)
    for name in METRICS[kind]:
        for each in (name, f"eval_{name}"):
            assert len(logged(found, each)) == 3 and logged(found, each) == logged(reference, each), each
            assert logged(plain, each) == pytest.approx(logged(expected, each), rel=1e-3, abs=1e-4), each


class Counting(OuroborosSFTTrainer):
    """Computes the token accuracy once more, of logits, and adds it to TRL's metrics."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        """As in TRL."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
        labels = inputs["labels"][:, 1:]
        hits = outputs.logits[:, :-1].argmax(-1)[labels != -100] == labels[labels != -100]
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["own_accuracy"].append(hits.float().mean().item())
        assert self._metrics[mode]["mean_token_accuracy"][-1] == pytest.approx(hits.float().mean().item())
        loss = loss + 0 * outputs.logits.sum()  # has no graph, as in TRL
        return (loss, outputs) if return_outputs else loss


@pytest.mark.slow
def test_a_loss_of_ones_own_finds_logits_and_its_metrics_are_of_its_tick(tmp_path: Path) -> None:
    runs = [
        run("sft", tmp_path / name, **given)
        for name, given in (
            ("plain", {}),
            ("late", {"cls": Counting}),
            ("made", {"cls": Counting, "fused_head": "off"}),
            ("reference", {"cls": Counting, "schedule": "reference"}),
        )
    ]
    for one, other in ((0, 1), (1, 3)):
        assert differing(outcome(runs[one])["weights"], outcome(runs[other])["weights"]) == []
    for mode in ("", "eval_"):
        for found in runs[1:]:
            accuracy = logged(found, f"{mode}mean_token_accuracy")
            assert len(accuracy) == 3 and logged(found, f"{mode}own_accuracy") == pytest.approx(accuracy)
        assert logged(runs[1], f"{mode}own_accuracy") == logged(runs[3], f"{mode}own_accuracy")
        assert logged(runs[1], f"{mode}entropy") == pytest.approx(logged(runs[2], f"{mode}entropy"), rel=1e-3)


@pytest.mark.slow
def test_losses_of_logits(tmp_path: Path) -> None:
    """Label smoothing needs logits, so they are made; TRL's metrics are of the same ones."""
    smoothed = {"label_smoothing_factor": 0.1, "max_steps": 2}
    on, off = (run("sft", tmp_path / fused, fused_head=fused, **smoothed) for fused in ("on", "off"))
    assert differing(outcome(on)["weights"], outcome(off)["weights"]) == []
    assert logged(on, "entropy") == logged(off, "entropy")


def test_precision_of_a_late_head(tmp_path: Path) -> None:
    """Under autocast the head computes in bfloat16 whether its logits are made or not, in evaluation, too."""
    on, off = (
        run("sft", tmp_path / fused, fused_head=fused, bf16=True, max_steps=1, learning_rate=1e-9)
        for fused in ("on", "off")
    )
    for name in ("entropy", "eval_entropy", "eval_loss"):
        assert logged(on, name) == pytest.approx(logged(off, name), rel=1e-5), name
