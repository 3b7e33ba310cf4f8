"""Agreement: at which points the processes of a run compare what they know, and what they compare there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainingArguments

from ..arguments import OuroborosArguments
from ..engine.settings import EngineSettings
from ..engine.state import RunState
from ..processes import run_digest
from ..processes.handshake import Facts
from .interfaces import SplitTrainer


class AgreementHooks(SplitTrainer):
    """Has all processes compare options, model, split, optimizer and data before anything depends on them.

    They meet when the trainer is made, twice (options; then the model, the plan and the accelerator), at `train()`, at
    every evaluation and at `save_model()`. In a run of a single process nothing happens.
    """

    _resumed_state: RunState | None
    _train_data: Mapping[str, Any] | None = None
    _beside: tuple[TrainingArguments, OuroborosArguments] | None = None

    @property
    def options(self) -> OuroborosArguments:
        """All options: the script's own arguments, which `args` is, and where they have none, the defaults of this package."""
        if self._beside is None or self._beside[0] is not self.args:
            self._beside = self.args, OuroborosArguments.from_training_arguments(self.args)
        return self._beside[1]

    def _agree(self, where: str, facts: Callable[[], Facts] = dict, args: TrainingArguments | None = None) -> None:
        """Compares what the processes know; see `Processes.agree`."""
        args = self.args if args is None else args
        self._processes.agree(where, facts, args.ddp_timeout_delta)

    def _agree_on_model(self, model: nn.Module, args: TrainingArguments) -> None:
        """Before the model is split."""
        self._agree(
            "splitting the model",
            lambda: {"model": run_digest.model(model), "weights": run_digest.weights(model)},
            args,
        )

    def _agree_on_plan(self, args: TrainingArguments) -> None:
        """After it, before anything travels between stages."""
        self._agree("connecting the stages", lambda: {"plan": run_digest.plan(self._partition.plan.rows)}, args)

    def _agree_on_training(self, settings: EngineSettings, compensation: str) -> None:
        """At `train()`: everything that may have been changed since, and what is known only now."""

        def facts() -> Facts:
            resumed = self._resumed_state
            # Hosts may have different numbers of cores.
            names = [field.name for field in fields(settings) if field.name not in ("threads", "compensations")]
            compared = {name: run_digest.plain(getattr(settings, name)) for name in names}
            return {
                "options": run_digest.options(self.options),
                "settings": compared | {"compensation": compensation},
                "model": run_digest.model(self.model),
                "weights": run_digest.weights(self.model),
                "plan": run_digest.plan(self._partition.plan.rows),
                "optimizer": run_digest.optimizer(self._face.optimizer, self.model),
                "scheduler": run_digest.scheduler_facts(self.lr_scheduler),
                "data": self._train_data or {},
                "steps": {
                    "global step": self.state.global_step,
                    "max_steps": self.state.max_steps,
                    "num_train_epochs": self.state.num_train_epochs,
                    "checkpoint": None if resumed is None else f"tick {resumed.tick}, update {resumed.update}",
                    "seed of the checkpoint": None if resumed is None else resumed.seed,
                },
            }

        self._agree("train()", facts)

    def _agree_on_evaluation(self, loader: DataLoader, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._agree(
            "an evaluation",
            lambda: {
                "call": {"arguments of the evaluation": [run_digest.plain(args), run_digest.plain(kwargs)]},
                "options": run_digest.options(self.options),
                "data": run_digest.data(loader, loader.dataset, loader.collate_fn),
            },
        )

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer; what it reads, and in which order, is compared when training begins."""
        loader = super().get_train_dataloader()
        if not self._processes.alone:
            self._train_data = run_digest.data(loader, self.train_dataset, self.data_collator)
        return loader


def facts_of_creation(args: TrainingArguments, callbacks: Sequence[Any] | None, **given: Any) -> Facts:
    """What processes compare when they meet: software, options, and which functions and callbacks a script has given."""
    own = {name: run_digest.plain(value) for name, value in given.items()}
    own |= run_digest.stopping([c for c in callbacks or () if isinstance(c, EarlyStoppingCallback)])
    return {"software": run_digest.software(), "options": run_digest.options(args), "arguments": own}
