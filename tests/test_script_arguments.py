"""The script's own arguments object stays what it is, and is asked when something is needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import Rows, common_options, ouroboros, split_options, tiny_model
from transformers import TrainerCallback, TrainingArguments

from hf_ouroboros import OuroborosArguments, OuroborosTrainer
from hf_ouroboros.errors import UnsupportedOptionError


@dataclasses.dataclass
class Tempered(TrainingArguments):
    """A script's own: an option, a method, a property in the place of Trainer's."""

    temperature: float = 2.0

    def temperature_at(self, step: int) -> float:
        return self.temperature / (1 + step)

    @property
    def train_batch_size(self) -> int:
        return 2


@dataclasses.dataclass
class Synchronous(OuroborosArguments):
    """Another default."""

    schedule: str = "1f1b"


def trainer_with(args: TrainingArguments, **given: Any) -> OuroborosTrainer:
    return OuroborosTrainer(tiny_model(dropout=0.0), args, train_dataset=Rows(18), **given)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TrainingArguments, Tempered, OuroborosArguments, Synchronous])
def test_it_is_the_script_s_own(tmp_path: Path, kind: type[TrainingArguments]) -> None:
    args = kind(**common_options(tmp_path))
    args.note = "of the script"
    before = dict(vars(args))
    trainer = trainer_with(args)
    assert trainer.args is args and type(args) is kind
    assert {k: v for k, v in vars(args).items() if not k.startswith("_")} == {
        k: v for k, v in before.items() if not k.startswith("_")
    }
    assert isinstance(trainer.options, OuroborosArguments)
    assert trainer.options.schedule == ("1f1b" if kind is Synchronous else "pipelined")
    args.max_steps = 2
    args.later = 3
    assert trainer.train().global_step == 2
    assert trainer.options.later == 3 and trainer.options.note == "of the script"
    trainer.save_model(str(tmp_path / "saved"))
    read = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert type(read) is kind and read.max_steps == 2


def test_methods_and_properties_count(tmp_path: Path) -> None:
    args = Tempered(**common_options(tmp_path))
    seen = []

    class Asks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(args.temperature_at(state.global_step))

    trainer = trainer_with(args, callbacks=[Asks()])
    assert trainer.get_train_dataloader().total_batch_size == 2
    trainer.train()
    assert seen[:2] == [2.0, 1.0] and trainer.state.global_step == 10


def test_own_options_changed_after_construction(tmp_path: Path) -> None:
    trainer = ouroboros(tmp_path, num_train_epochs=1, **split_options(3, 2))
    trainer.args.num_stages, trainer.args.schedule = 2, "lockstep"
    trainer.train()
    assert trainer.stage_plan.num_stages == 2 and trainer.engine.settings.schedule == "lockstep"
    trainer.args.clip_scope, trainer.args.schedule = "global", "pipelined"
    with pytest.raises(UnsupportedOptionError, match="clip_scope='global'"):
        trainer.train()


def test_what_the_engine_was_started_with_cannot_change_while_it_runs(tmp_path: Path) -> None:
    class Changes(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.max_grad_norm = 0.5

    with pytest.raises(UnsupportedOptionError, match=r"max_grad_norm=0.5 .* began with 1.0"):
        ouroboros(tmp_path, {"callbacks": [Changes()]}, **split_options(3, 2)).train()
