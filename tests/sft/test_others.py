"""TRL's other trainers, and what a user would try with models of TRL: refused by name, with the reason."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import trl
from sft_cases import options, rows, tiny, tokenizer
from trainer_helpers import ouroboros, split_options
from transformers import LlamaForSequenceClassification
from trl import SFTConfig, SFTTrainer

import hf_ouroboros.trl
from hf_ouroboros import UnsupportedModelError
from hf_ouroboros.errors import UnsupportedTrainerError
from hf_ouroboros.trl import OuroborosSFTConfig, OuroborosSFTTrainer


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("GRPO", "samples from the model while it trains"),
        ("RLOO", "samples from the model while it trains"),
        ("PPO", "samples from the model while it trains"),
        ("Reward", "one number for a text"),
        ("KTO", "more than once for a batch"),
        ("ORPO", "experimental"),
        ("Distillation", "a second model"),
    ],
)
def test_other_trainers(kind: str, why: str) -> None:
    for name in (f"Ouroboros{kind}Trainer", f"Ouroboros{kind}Config", f"{kind}Trainer", f"{kind}Config"):
        with pytest.raises(UnsupportedTrainerError, match=f"there is no {name}: .*{why}"):
            getattr(hf_ouroboros.trl, name)
    with pytest.raises(ImportError, match=why):  # as of any name that can't be imported
        exec(f"from hf_ouroboros.trl import Ouroboros{kind}Trainer")


def test_every_trainer_of_trl_is_here_or_refused() -> None:
    for name in dir(trl):
        if name.endswith("Trainer"):
            if f"Ouroboros{name}" in hf_ouroboros.trl.__all__:
                assert getattr(hf_ouroboros.trl, f"Ouroboros{name}")
                with pytest.raises(UnsupportedTrainerError, match=f"it is called Ouroboros{name}"):
                    getattr(hf_ouroboros.trl, name)
            else:
                with pytest.raises(UnsupportedTrainerError, match=name):
                    getattr(hf_ouroboros.trl, name)


def test_other_names_are_missing_as_ever() -> None:
    for name in ("OuroborosFooTrainer", "nothing", "__path_of_nothing__"):
        with pytest.raises(AttributeError, match="has no attribute"):
            getattr(importlib.import_module("hf_ouroboros.trl"), name)


def test_models_of_trl(tmp_path: Path) -> None:
    config = tiny().config
    config.num_labels, config.pad_token_id = 1, 1
    with pytest.raises(UnsupportedModelError, match=r"is no language model: .* one number \(a reward\)"):
        ouroboros(tmp_path, {"model": LlamaForSequenceClassification(config)}, **split_options(2, 2))
    args = SFTConfig(**options(tmp_path, gradient_checkpointing=False))
    data = {"train_dataset": rows("text"), "processing_class": tokenizer()}
    model = SFTTrainer(tiny(), args, **data).model
    for stages in (1, 2):
        with pytest.raises(UnsupportedModelError, match="was replaced by .* Trainers of TRL leave one behind"):
            ouroboros(tmp_path, {"model": model}, **split_options(stages, stages))
    del model.forward
    OuroborosSFTTrainer(model, OuroborosSFTConfig(**options(tmp_path, **split_options(2, 2))), **data)
